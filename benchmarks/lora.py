"""What LoRA costs a decode step: an engine without room for adapters, beside one with room, used or not.

    python benchmarks/lora.py [--model MODEL] [--max-loras 4] [--rank 16] [--rounds 5] [--out FILE]

Adapters are random, of the whole rank and of every matrix that may have one. The kinds take turns, so that a busy spell
of the machine meets all: "none", the engine without room; "base", with room and no row that uses it; "mixed", rows that
take turns with the adapters and the base model. A step is timed from one dispatch to the next, with all rows decoding.
Reported is the tenth percentile of each kind's steps, which on a shared machine are those of its quiet moments.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve import Engine, SamplingParams
from jaxserve.bench.environment import environment
from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.config import ModelConfig
from jaxserve.model.lora import Adapter, factor_shapes

ROWS, PROMPT_LEN, NEW_TOKENS = (1, 8), 16, 48
OPTIONS: dict[str, Any] = {
    "max_model_len": PROMPT_LEN + NEW_TOKENS + 16,
    "max_num_seqs": max(ROWS),
    "decode_sizes": ROWS,
    "prefill_sizes": (max(ROWS) * (PROMPT_LEN + 1),),
    "max_prefill_rows": max(ROWS),
    "prefix_caching": False,
    "samplings": ("greedy",),
}
KINDS = ("none", "base", "mixed")


def random_adapter(config: ModelConfig, rank: int, seed: int) -> Adapter:
    r = np.random.default_rng(seed)

    def factors(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        first, second = r.standard_normal(a, np.float32), r.standard_normal(b, np.float32)
        return first * a[-1] ** -0.5, second * (0.01 * rank**-0.5)

    layers = [
        {name: factors(*shapes) for name, shapes in factor_shapes(config, i, rank).items()}
        for i in range(config.num_layers)
    ]
    return Adapter(rank, tuple(layers))


def run(engine: Engine, loras: list[str | None], seed: int) -> list[float]:
    """Seconds of each step that decodes all rows, one for each of ``loras``."""
    r = random.Random(seed)
    for lora in loras:
        prompt = [r.randrange(3, engine.model_config.vocab_size) for _ in range(PROMPT_LEN)]
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        engine.add_request(engine.make_request(prompt, params, lora=lora))
    walls = []
    start = time.perf_counter()
    while engine.has_unfinished():
        events = engine.step()
        end = time.perf_counter()
        if len(events) == len(loras) and events[0].index > 1:
            walls.append(end - start)
        start = end
    return walls


def measure(model: str, max_loras: int, rank: int, rounds: int) -> list[dict[str, Any]]:
    options = {**OPTIONS, "skip_tokenizer_init": True}
    with (
        Engine.from_pretrained(model, **options) as plain,
        Engine.from_pretrained(model, max_loras=max_loras, max_lora_rank=rank, **options) as room,
    ):
        names = [f"adapter {i}" for i in range(max_loras)]
        for i, name in enumerate(names):
            room.add_lora(name, random_adapter(room.model_config, rank, i))
        found = []
        for rows in ROWS:
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for number in range(rounds + 1):
                for kind in KINDS:
                    used = [([*names, None] * rows)[i] if kind == "mixed" else None for i in range(rows)]
                    walls = run(plain if kind == "none" else room, used, number)
                    if number:  # the first round warms up
                        seconds[kind] += walls
            tpot = {kind: statistics.quantiles(values, n=10)[0] for kind, values in seconds.items()}
            found.append(
                {
                    "model": plain.model_name,
                    "max_loras": max_loras,
                    "max_lora_rank": rank,
                    "rows": rows,
                    "steps": len(seconds["none"]),
                    "tpot_ms": {kind: round(1e3 * value, 3) for kind, value in tpot.items()},
                    "ratio_to_none": {kind: round(tpot[kind] / tpot["none"], 3) for kind in KINDS[1:]},
                }
            )
        assert room.stats().recompilations_after_ready == plain.stats().recompilations_after_ready == 0
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--max-loras", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.model, args.max_loras, args.rank, args.rounds)
    command = f"python benchmarks/lora.py --max-loras {args.max_loras} --rank {args.rank} --rounds {args.rounds}"
    text = json.dumps({"command": command, **environment(), "rows": rows}, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
