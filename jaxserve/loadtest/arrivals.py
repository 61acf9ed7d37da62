"""Which requests come when: from a rate, or from the file of a trace."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.workload import length_varied

MOONCAKE_BLOCK = 512  # tokens that one of a Mooncake trace's ``hash_ids`` stands for


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request.

    Attributes:
        at_s: seconds after the start.
        prompt_len: tokens. With ``follows`` the prompt is that request's prompt and output, and what is missing.
        blocks: what the prompt is made of, ``block_len`` tokens each: equal numbers, equal tokens.
        follows: index of the session's request before this one, which has to have ended.
    """

    at_s: float
    prompt_len: int
    num_output_tokens: int
    blocks: tuple[int, ...]
    block_len: int
    follows: int | None = None

    def prompt(self, vocab_size: int, before: Sequence[int] = ()) -> list[int]:
        """Its tokens; ``before``: prompt and output of the request that it follows. No special tokens of small ids."""
        tokens = list(before[: self.prompt_len])
        for block in self.blocks:
            if len(tokens) >= self.prompt_len:
                break
            r = random.Random(block)
            tokens += [r.randrange(min(16, vocab_size - 1), vocab_size) for _ in range(self.block_len)]
        return tokens[: self.prompt_len]


def poisson(num_requests: int, rate: float, *, seed: int, max_prompt: int, max_output: int) -> list[Arrival]:
    """Requests at random moments, ``rate`` a second on average (inf: all at 0), of ``length_varied``'s lengths."""
    if not rate > 0:
        raise ValueError(f"request_rate={rate:g} is not more than 0")
    items = length_varied(num_requests, seed=seed, max_prompt=max_prompt, max_output=max_output, vocab_size=2)
    r = random.Random(f"arrivals of {seed}")
    now, arrivals = 0.0, []
    for i, item in enumerate(items):
        arrivals.append(
            Arrival(
                at_s=now,
                prompt_len=len(item.prompt),
                num_output_tokens=item.num_output_tokens,
                blocks=(seed * 1_000_003 + i,),
                block_len=len(item.prompt),
            )
        )
        now += 0.0 if rate == float("inf") else r.expovariate(rate)
    return arrivals


def read_trace(path: Path) -> list[Arrival]:
    """A trace, a JSON object a line, in order of arrival.

    Either form: ``arrival_s``, ``prompt_len``, ``output_len`` and, for turns of a chat, ``session`` and ``turn``; or
    Mooncake's ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids`` of blocks of 512 tokens.

    Raises:
        ValueError: names the file, line and field.
        OSError: the file cannot be read.
    """
    arrivals: list[Arrival] = []
    last_of: dict[int, int] = {}  # session -> its last request
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
        index = len(arrivals)
        if "timestamp" in row:
            blocks = row.get("hash_ids")
            if not isinstance(blocks, list) or any(type(b) is not int for b in blocks):
                raise ValueError(f"{where}: hash_ids={blocks!r:.80} is not a list of integers")
            prompt_len = _number(row, "input_length", where, 1)
            if len(blocks) * MOONCAKE_BLOCK < prompt_len:
                raise ValueError(f"{where}: {len(blocks)} hash_ids are too few for input_length={prompt_len}")
            arrival = Arrival(
                at_s=_number(row, "timestamp", where, 0) / 1000,
                prompt_len=int(prompt_len),
                num_output_tokens=int(_number(row, "output_length", where, 1)),
                blocks=tuple(blocks),
                block_len=MOONCAKE_BLOCK,
            )
        else:
            prompt_len = int(_number(row, "prompt_len", where, 1))
            session = int(_number({"session": index} | row, "session", where, 0))
            turn = _number({"turn": 0} | row, "turn", where, 0)
            arrival = Arrival(
                at_s=float(_number(row, "arrival_s", where, 0)),
                prompt_len=prompt_len,
                num_output_tokens=int(_number(row, "output_len", where, 1)),
                blocks=(1_000_003 * (session + 1) + int(turn),),
                block_len=prompt_len,
                follows=last_of.get(session) if turn else None,
            )
            last_of[session] = index
        if arrivals and arrival.at_s < arrivals[-1].at_s:
            raise ValueError(f"{where}: arrives at {arrival.at_s:g} s, the line before at {arrivals[-1].at_s:g} s")
        arrivals.append(arrival)
    if not arrivals:
        raise ValueError(f"{path.name}: has 0 requests")
    return arrivals


def _number(row: dict[str, Any], name: str, where: str, least: float) -> float:
    value: Any = row.get(name)
    if type(value) not in (int, float) or not least <= value < float("inf"):
        raise ValueError(f"{where}: {name}={value!r:.80} is not a number of at least {least:g}")
    return value
