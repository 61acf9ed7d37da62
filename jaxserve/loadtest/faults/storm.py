"""Many clients of all kinds at once."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from jaxserve.loadtest.faults import over_grpc, over_http
from jaxserve.loadtest.faults.killed import killed
from jaxserve.loadtest.faults.known import Kind, Known, Site, WrongAnswerError
from jaxserve.server.client import AsyncClient

KINDS: dict[str, Kind] = {**over_grpc.KINDS, **over_http.KINDS, "killed": killed}
Outcomes = Counter[tuple[str, str]]  # of (kind, how it ended)


@asynccontextmanager
async def site_of(target: str, url: str) -> AsyncGenerator[Site]:
    """The server at gRPC's ``target`` and HTTP's ``url``, both of this machine."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0), ("grpc.max_send_message_length", -1)]
    async with AsyncClient(target) as client, grpc.aio.insecure_channel(target, options=options) as channel:
        yield Site(target, url, client, channel, await client.server_info(), await client.model_info())


async def storm(
    site: Site, clients: Sequence[tuple[str, Known]], *, num_at_once: int, seed: int = 0, timeout_s: float = 300.0
) -> Outcomes:
    """Plays ``clients``, each a name of ``KINDS`` and what it asks.

    Raises:
        WrongAnswerError: one of them, by its number and kind, got a wrong answer, another error or none in time. All
            others have ended by then.
    """
    outcomes: Outcomes = Counter()
    errors: list[str] = []
    waiting = iter(enumerate(clients))

    async def play() -> None:
        for i, (name, known) in waiting:
            try:
                async with asyncio.timeout(timeout_s):
                    outcomes[name, await KINDS[name](site, known, random.Random(f"{seed} {i}"))] += 1
            except Exception as error:
                errors.append(f"client {i}, {name}: {type(error).__name__}: {error}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_at_once):
            tasks.create_task(play())
    if errors:
        raise WrongAnswerError(f"{len(errors)} of {len(clients)} clients:\n" + "\n".join(errors[:20]))
    return outcomes
