"""Open loop: every request is sent when its time has come, however the server does, and its answer is timed."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from jaxserve.loadtest.arrivals import Arrival
from jaxserve.server.client import AsyncClient


@dataclass
class Answer:
    """What became of one request. Seconds of ``time.perf_counter()``.

    Attributes:
        due: when it had to be sent: latencies count from here, so that a late client flatters nobody.
        sent: when it was.
        messages: (when, how many tokens) of each message that had some.
        error: the status that it ended with; None: it was answered whole.
    """

    due: float
    sent: float = 0.0
    prompt_len: int = 0
    messages: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: str | None = None


async def replay(
    client: AsyncClient, arrivals: Sequence[Arrival], vocab_size: int, *, timeout_s: float | None = None
) -> list[Answer]:
    """Sends ``arrivals`` and returns their answers in the same order, when all have ended.

    Every answer is greedy and has all the tokens that were asked for. A turn of a chat is due at its time, or when the
    answer before it has come, if that is later: nobody answers what is not yet said.
    """
    start = time.perf_counter()
    answers = [Answer(start + arrival.at_s) for arrival in arrivals]
    prompts: list[list[int]] = [[] for _ in arrivals]
    ended = [asyncio.Event() for _ in arrivals]

    async def one(i: int) -> None:
        arrival, answer = arrivals[i], answers[i]
        try:
            before: list[int] = []
            if arrival.follows is not None:
                await ended[arrival.follows].wait()
                before = prompts[arrival.follows] + answers[arrival.follows].tokens
                answer.due = max(answer.due, time.perf_counter())
            prompts[i] = arrival.prompt(vocab_size, before)
            await asyncio.sleep(answer.due - time.perf_counter())
            answer.sent, answer.prompt_len = time.perf_counter(), len(prompts[i])
            stream = client.generate(
                token_ids=prompts[i],
                max_tokens=arrival.num_output_tokens,
                ignore_eos=True,
                temperature=0.0,
                timeout_s=timeout_s,
            )
            async for chunk in stream:
                if chunk.token_ids:
                    answer.messages.append((time.perf_counter(), len(chunk.token_ids)))
                    answer.tokens += chunk.token_ids
        except grpc.aio.AioRpcError as error:
            answer.error = error.code().name
        finally:
            ended[i].set()

    async with asyncio.TaskGroup() as tasks:
        for i, arrival in enumerate(arrivals):
            # Not all tasks at once: making prompts would delay the first ones.
            await asyncio.sleep(max(0.0, start + arrival.at_s - 1.0 - time.perf_counter()))
            tasks.create_task(one(i))
    return answers
