"""256 clients at once, many of which break off or break in, against the real engine with a pool far too small for them.

Whoever stays has exactly the tokens of a run alone, and of whoever has left nothing is left.
"""

import asyncio
import gc
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.engine.event_stream import EventStream
from jaxserve.loadtest.faults.known import Known, Site
from jaxserve.loadtest.faults.storm import KINDS, site_of, storm
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.sequence import Sequence
from jaxserve.server.app import Server, serve
from jaxserve.server.options import ServerOptions
from tests import tiny
from tests.server.conftest import TIMEOUT_S
from tests.server.http.conftest import web

pytestmark = pytest.mark.timeout(600)  # a busy machine compiles and runs slowly

NUM_CLIENTS = 256
MAX_NUM_WAITING = 400
SIZES = {"num_pages": 40, "max_num_seqs": 8, "max_model_len": 96, "page_size": 4, "max_num_waiting": MAX_NUM_WAITING}
OPTIONS = ServerOptions(
    port=0, http_port=0, slow_reader_timeout_s=3.0, max_message_bytes=2**18, drain_timeout_s=TIMEOUT_S * 5
)
STAY = ("grpc whole", "grpc slow", "grpc batch", "http whole", "http slow", "http completion", "http websocket")
IMPATIENT = ("grpc impatient", "http impatient")
ASK_ONCE = ("grpc whole", "grpc slow", "grpc choices", "http whole", "http slow")
RARE = {"grpc stall": 2, "http stall": 2, "killed": 1}  # seconds, sequences or a process each


def known_requests(engine: Engine, count: int) -> list[Known]:
    r = random.Random(0)
    found = []
    for i, prompt in enumerate(tiny.prompts(count)):
        fields = {"max_tokens": r.randint(1, 30), "temperature": r.choice([0.0, 1.0]), "seed": i}
        fields["ignore_eos"] = r.random() < 0.5
        [alone] = engine.generate([prompt], SamplingParams(**fields))
        found.append(Known(tuple(prompt), fields, tuple(alone.token_ids), alone.text))
    return found


class Traces:
    """What clients could leave behind in this process, where both they and the server are."""

    def __init__(self):
        self._before = self._count()

    @staticmethod
    def _count() -> Counter[str]:
        gc.collect()
        kept = Counter(kind.__name__ for x in gc.get_objects() if (kind := type(x)) in (Request, Sequence, EventStream))
        threads = [t for t in threading.enumerate() if not t.name.startswith("asyncio_")]  # that pool has six at most
        return kept + Counter(
            tasks=len(asyncio.all_tasks()), threads=len(threads), files=len(os.listdir("/proc/self/fd"))
        )

    async def are_gone(self) -> None:
        """Waits: connections end a moment after their clients have left."""
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        while more := self._count() - self._before:
            assert asyncio.get_running_loop().time() < deadline, f"left: {dict(more)}"
            await asyncio.sleep(0.1)


@asynccontextmanager
async def serving(engine: Engine) -> AsyncGenerator[Server]:
    """As a process serves: until SIGTERM, which the block has to send."""
    ready: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(serve(lambda: engine, OPTIONS, on_ready=ready.set_result))
    try:
        await asyncio.wait((ready, running), return_when=asyncio.FIRST_COMPLETED)
        yield ready.result()
        await asyncio.wait_for(running, TIMEOUT_S)
    finally:
        running.cancel()
        await asyncio.wait((running,))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


def site(server: Server):
    return site_of(f"127.0.0.1:{server.port}", f"http://127.0.0.1:{server.http_port}")


@asynccontextmanager
async def held(server: Server) -> AsyncGenerator[None]:
    """The engine's thread takes no command and no step during the block."""
    may_go_on = threading.Event()
    server.engine._post(lambda _: may_go_on.wait())
    try:
        yield
    finally:
        may_go_on.set()


async def until_asked(server: Server, num_requests: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while len(server.engine._commands) < num_requests:
            await asyncio.sleep(0.01)


async def check_idle(engine: Engine) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while engine.has_unfinished():  # that a client has left comes to the engine's thread a moment later
            await asyncio.sleep(0.01)
    stats = engine.stats()
    assert stats.num_pages_held == stats.num_running == stats.num_waiting == stats.num_active_rows == 0
    assert engine.page_map().sequences == ()
    assert stats.recompilations_after_ready == 0


async def storm_of_faults(s: Site, *, known: list[Known]) -> None:
    r = random.Random(0)
    names = [name for name in KINDS for _ in range(RARE.get(name, 3))]
    names += r.choices(STAY, k=NUM_CLIENTS - len(names))
    r.shuffle(names)
    clients = [(name, known[i % len(known)]) for i, name in enumerate(names)]
    outcomes = await storm(s, clients, num_at_once=NUM_CLIENTS)
    assert sum(outcomes.values()) == NUM_CLIENTS
    ends = {end for _, end in outcomes}
    assert ends >= {"left", "abort", "closed", "killed", "cancelled", "ABORTED", "UNAVAILABLE", "413"}, outcomes
    assert all(outcomes[name, "whole"] >= 3 for name in STAY if name != "http websocket"), outcomes


async def overflow(server: Server, s: Site, *, known: list[Known]) -> None:
    """Of two choices each, so that there are more than may wait."""
    doubled = [replace(k, sampling={**k.sampling, "n": 2}) for k in known]
    clients = [(IMPATIENT[i % 2], doubled[i % len(doubled)]) for i in range(NUM_CLIENTS)]
    num_fit = MAX_NUM_WAITING // 2
    async with held(server):
        first = asyncio.create_task(storm(s, clients[:num_fit], num_at_once=num_fit))
        await until_asked(server, num_fit)
        others = asyncio.create_task(storm(s, clients[num_fit:], num_at_once=NUM_CLIENTS - num_fit))
        await until_asked(server, NUM_CLIENTS)
    assert set(await first) == {(name, "whole") for name in IMPATIENT}
    assert set(await others) == {(IMPATIENT[0], "RESOURCE_EXHAUSTED"), (IMPATIENT[1], "queue_full")}


async def sigterm(server: Server, s: Site, known: list[Known]) -> None:
    """Whoever had asked before it is answered, nobody who asks after it is."""
    clients = [(name, known[i % len(known)]) for i in range(NUM_CLIENTS) if (name := ASK_ONCE[i % len(ASK_ONCE)])]
    async with held(server):
        asking = asyncio.create_task(storm(s, clients, num_at_once=NUM_CLIENTS))
        await until_asked(server, NUM_CLIENTS)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_S):
            while server.engine.state != "draining":
                await asyncio.sleep(0.001)
        late = await storm(s, [(name, known[0]) for name in IMPATIENT], num_at_once=2)
        assert late == Counter({(IMPATIENT[0], "UNAVAILABLE"): 1, (IMPATIENT[1], "not_serving"): 1})
    outcomes = await asking
    assert Counter(end for _, end in outcomes.elements()) == Counter(whole=NUM_CLIENTS)


async def test_faults_then_a_full_queue_then_sigterm():
    async with web() as other:  # what grpc and asyncio open once and keep
        await other.post("/v1/completions", prompt="a", max_tokens=2)
        async for _ in other.served.client.generate("a", max_tokens=2):
            pass
    engine = tiny.engine(**SIZES)
    known = known_requests(engine, 40)
    short = [k for k in known if len(k.tokens) <= 8]
    without_server = Traces()
    async with serving(engine) as server:
        async with site(server) as s:
            await storm(s, [(name, known[0]) for name in STAY], num_at_once=len(STAY))
        with_server = Traces()
        num_preemptions = engine.stats().num_preemptions
        for test in (partial(storm_of_faults, known=known), partial(overflow, server, known=short)):
            async with site(server) as s:
                await test(s)
                await check_idle(engine)
                await storm(s, [("grpc whole", known[0])], num_at_once=1)  # grpc keeps its last call, refused or not
            await with_server.are_gone()
        assert engine.stats().num_preemptions > num_preemptions  # there were too few pages
        async with site(server) as s:
            await sigterm(server, s, short)
            await check_idle(engine)
    await without_server.are_gone()
