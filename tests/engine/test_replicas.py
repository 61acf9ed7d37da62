"""Replicas: tokens as of one engine, whoever serves a request; what is asked of the engine is asked of all of them."""

import asyncio
import dataclasses
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve import Engine, SamplingParams
from jaxserve.config import ParallelConfig
from jaxserve.engine import replicas
from jaxserve.engine.async_engine import AsyncEngine, EngineFailedError
from jaxserve.engine.loop import StepLoop
from jaxserve.engine.plan import resolve_meshes
from jaxserve.engine.replicas import Replicas
from jaxserve.errors import QueueFullError, RequestError, UnknownLoraError
from jaxserve.model.params import TreeSource, init_params, named_leaves
from jaxserve.parallel.mesh import make_mesh, make_meshes, parse_mesh
from jaxserve.request import Request
from jaxserve.step_io import StepOutputs
from tests import tiny
from tests.halt import Halt, all_replicas_run
from tests.lora.adapters import merged, random_adapter
from tests.oracle import oracle_greedy

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)  # what a mesh does with more is tested elsewhere
BASE = dataclasses.replace(tiny.params(), layers=tiny.params().layers[:1])
SIZES: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 3, "num_pages": 40, "page_size": 4,
                         "prefill_sizes": (16,), "decode_sizes": (3,), "max_prefill_rows": 2,
                         "samplings": ("any",)}  # fmt: skip
PROMPTS = tiny.prompts(9, seed=1)
DRAWN = SamplingParams(temperature=0.9, seed=3, max_tokens=7, ignore_eos=True, logprobs=2, n=2)


def greedy(num_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def expected(prompts: list[list[int]], num_tokens: int = 12, params: Any = BASE) -> list[list[int]]:
    return [oracle_greedy(CONFIG, params, p, num_tokens) for p in prompts]


@pytest.fixture(scope="module")
def single() -> Iterator[Engine]:
    with Engine.from_params(CONFIG, BASE, tiny.tokenizer(), **SIZES) as engine:
        yield engine


class Counting(TreeSource):
    """How many numbers of each parameter are read."""

    def __init__(self):
        super().__init__(jax.tree.map(np.asarray, BASE), CONFIG)
        self.num_read: dict[str, int] = {}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = super().read(name, index)
        self.num_read[name] = self.num_read.get(name, 0) + part.size
        return part


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    source = Counting()
    with Engine.from_params(CONFIG, source, tiny.tokenizer(), **SIZES, mesh="replica=2", max_loras=1, max_lora_rank=2,
                            max_num_waiting=12) as engine:  # fmt: skip
        assert source.num_read == {name: np.asarray(leaf).size for name, leaf in named_leaves(BASE)}  # once
        yield engine
        stats = engine.stats()
        assert stats.num_pages_held == stats.num_running == stats.num_waiting == stats.recompilations_after_ready == 0


def add(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> int:
    """The replica that got the request."""
    engine.add_request(engine.make_request(prompt, params, request_id=name))
    replica = engine.replicas.replica_of(name)
    assert replica is not None
    return replica


def finish(engine: Engine) -> dict[str, list[int]]:
    """Every request's tokens from now on."""
    said: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for event in engine.step():
            said.setdefault(event.request_id, []).extend([] if event.token_id is None else [event.token_id])
    return said


def check_tokens(engine: Engine, single: Engine) -> None:
    """Of greedy and of random requests, all at once, on both replicas."""
    before = [own.generation_tokens for own in engine.stats().replicas]
    assert [c.token_ids for c in engine.generate(PROMPTS, greedy())] == expected(PROMPTS)
    assert all(own.generation_tokens > n for own, n in zip(engine.stats().replicas, before, strict=True))
    for got, want in zip(engine.generate(PROMPTS[:4], DRAWN), single.generate(PROMPTS[:4], DRAWN), strict=True):
        assert (got.token_ids, got.choice, got.text) == (want.token_ids, want.choice, want.text)
        assert [x.logprob for x in got.logprobs or ()] == pytest.approx(
            [x.logprob for x in want.logprobs or ()], abs=1e-4
        )
    assert engine.stats().num_pages_held == 0


def test_tokens_are_those_of_one_engine(two: Engine, single: Engine):
    assert two.parallel_config == ParallelConfig(replica=2) and str(two.parallel_config) == "replica=2,stage=1,tensor=1"
    check_tokens(two, single)
    for got, want in zip(two.embed(PROMPTS[:4]), single.embed(PROMPTS[:4]), strict=True):
        np.testing.assert_allclose(got.values, want.values, atol=1e-5)


def test_each_has_the_weights_on_its_own_device(two: Engine):
    first, second = (dict(named_leaves(loop.runner._params)) for loop in two.replicas.loops)
    for name, leaf in second.items():
        assert leaf.sharding.device_set == {jax.devices()[1]} and leaf.sharding.spec == first[name].sharding.spec
        np.testing.assert_array_equal(leaf, first[name])


async def stream(engine: AsyncEngine, request: Request) -> tuple[list[int], str | None]:
    """A request's tokens, and why it ended."""
    events = [event async for event in engine.stream(request)]
    return [e.token_id for e in events if e.token_id is not None], events[-1].finish_reason


async def started(
    engine: AsyncEngine, requests: list[Request]
) -> tuple[list[asyncio.Task[tuple[list[int], str | None]]], Halt]:
    """Their streams, once both replicas run some; the engine waits."""
    halt = Halt(engine.engine, all_replicas_run)
    streams = [asyncio.create_task(stream(engine, request)) for request in requests]
    await halt.reached()
    return streams, halt


async def test_tensor_tokens_and_a_drain_that_leaves_no_page(single: Engine):
    engine = Engine.from_params(CONFIG, BASE, tiny.tokenizer(), **SIZES, mesh="replica=2,tensor=2")
    devices = [set(loop.runner.mesh.devices.flat) for loop in engine.replicas.loops]
    assert [len(own) for own in devices] == [2, 2] and not devices[0] & devices[1]
    check_tokens(engine, single)
    running = AsyncEngine(lambda: engine)
    await running.ready()
    requests = [engine.make_request(p, greedy(40)) for p in PROMPTS]
    streams, halt = await started(running, requests)
    aborting = asyncio.create_task(running.abort(requests[0].request_id))
    await asyncio.sleep(0)  # lets it start
    halt.end()
    assert await aborting
    assert await running.drain(60)
    said = await asyncio.gather(*streams)
    assert said[0][1] == "abort" and [tokens for tokens, _ in said[1:]] == expected(PROMPTS[1:], 40)
    stats = running.stats()
    assert stats is not None and [own.num_pages_held for own in stats.replicas] == [0, 0]
    assert stats.recompilations_after_ready == 0
    assert await running.close()


async def test_stage_tokens_and_a_failure_of_one_that_is_of_all():
    config, base = tiny.CONFIG, tiny.params()
    engine = Engine.from_params(config, base, tiny.tokenizer(), **SIZES, mesh="replica=2,stage=2")
    said = [c.token_ids for c in engine.generate(PROMPTS, greedy())]
    assert said == [oracle_greedy(config, base, prompt, 12) for prompt in PROMPTS]
    stats = engine.stats()
    assert all(own.generation_tokens for own in stats.replicas) and stats.num_pages_held == 0
    running = AsyncEngine(lambda: engine)
    await running.ready()
    streams, halt = await started(running, [engine.make_request(p, greedy(50)) for p in PROMPTS])

    def gone(handle: jax.Array) -> StepOutputs:
        raise RuntimeError("the device has gone")

    engine.replicas.loops[1].runner.read = gone
    halt.end()
    with pytest.raises(EngineFailedError, match="the device has gone"):
        await running.wait_stopped()
    ends = await asyncio.gather(*streams, return_exceptions=True)
    assert {type(end) for end in ends} <= {EngineFailedError, tuple} and running.state == "failed"
    assert EngineFailedError in map(type, ends)
    assert await running.close()


def test_requests_are_shared_out_and_completions_stay_together(two: Engine):
    places = [add(two, f"r{i}", [40 + i] * 9, greedy(4)) for i in range(4)]
    assert sorted(places) == [0, 0, 1, 1]
    together = add(two, "n", [50] * 9, dataclasses.replace(DRAWN, n=3))
    running = [own.num_running + own.num_waiting for own in two.stats().replicas]
    assert running[together] == 5 and running[1 - together] == 2
    said = finish(two)
    assert [said[f"r{i}"] for i in range(4)] == expected([[40 + i] * 9 for i in range(4)], 4)
    assert len(said["n"]) == 21 and two.replicas.replica_of("n") is None


def test_a_prefix_is_found_again(two: Engine):
    prompt = tiny.prompts(1, seed=9)[0] * 3
    prompt = (prompt + [3] * 60)[:60]
    home = add(two, "first", prompt, greedy(2))
    finish(two)
    for i in range(3):  # one at a time: nothing speaks against it
        assert add(two, f"again{i}", [*prompt, 5 + i], greedy(2)) == home
        finish(two)
    crowd = [add(two, f"crowd{i}", [*prompt, 20 + i], greedy(9)) for i in range(6)]
    assert set(crowd) == {0, 1} and crowd[:2] == [home, home]  # 56 tokens saved outweigh two of 3 + 2 * 9, not three
    finish(two)


def test_aborts_ids_and_the_queue_s_limit_are_of_all(two: Engine):
    places = {f"q{i}": add(two, f"q{i}", [60 + i] * 5, greedy(30)) for i in range(12)}
    with pytest.raises(RequestError, match="'q3' is already in use"):
        add(two, "q3", [1, 2], greedy())
    with pytest.raises(QueueFullError, match="12 requests are waiting, max_num_waiting=12"):
        add(two, "full", [1, 2], greedy())
    for _ in range(5):
        two.step()
    held = two.page_map()
    assert held.num_pages == 80
    for sequence in held.sequences:
        assert {page // 40 for page in sequence.pages} <= {places[sequence.request_id]}
    pages = [page for sequence in held.sequences for page in sequence.pages]
    assert len(pages) == len(set(pages)) == two.stats().num_pages_held > 0
    assert {places[s.request_id] for s in held.sequences if s.is_running} == {0, 1}
    for name in list(places)[:8]:
        assert two.abort(name) and not two.abort(name)
    assert not two.abort("nobody")
    said = finish(two)
    for i in range(8, 12):
        assert said[f"q{i}"] == expected([[60 + i] * 5], 30)[0][-len(said[f"q{i}"]) :]


def test_other_weights_reach_all(two: Engine):
    other = init_params(CONFIG, jax.random.key(8))
    for i in range(4):
        add(two, f"r{i}", PROMPTS[i], greedy(20))
    for _ in range(3):
        two.step()
    two.update_params(other)
    finish(two)
    assert two.stats().num_pages_held == 0
    assert [c.token_ids for c in two.generate(PROMPTS[:4], greedy())] == expected(PROMPTS[:4], params=other)
    with pytest.raises(ValueError, match="final_norm"):
        two.update_params(dataclasses.replace(other, final_norm=np.zeros(7, np.float32)))
    two.update_params(TreeSource(jax.tree.map(np.asarray, BASE), CONFIG))
    assert [c.token_ids for c in two.generate(PROMPTS[:4], greedy())] == expected(PROMPTS[:4])


def test_an_adapter_is_on_all_and_its_slot_is_free_when_none_uses_it(two: Engine):
    adapter = random_adapter(CONFIG, 1, rank=2)
    two.add_lora("a", adapter)
    prompts = PROMPTS[:6]
    done = two.generate(prompts, greedy(8), lora=["a", None] * 3)
    for completion, prompt, with_it in zip(done, prompts, [True, False] * 3, strict=True):
        assert completion.token_ids == expected([prompt], 8, merged(BASE, adapter) if with_it else BASE)[0]
    request = two.make_request([7] * 9, greedy(20), request_id="user", lora="a")
    other = add(two, "other", [8] * 9, greedy(2))  # so that its user is on the other one
    two.add_request(request)
    assert two.replicas.replica_of("user") == 1 - other
    two.step()
    two.unload_lora("a")
    with pytest.raises(UnknownLoraError, match="'a' is not loaded"):
        two.make_request([7], greedy(), lora="a")
    with pytest.raises(RequestError, match="max_loras=1 are on the device: 'a', unloaded but in use"):
        two.add_lora("b", adapter)
    assert [(load.name, load.num_running + load.num_waiting) for load in two.stats().loras] == [("a", 1)]
    assert finish(two)["user"] == expected([[7] * 9], 20, merged(BASE, adapter))[0]
    two.add_lora("b", adapter)
    two.unload_lora("b")


class Handle:
    ready = False

    def is_ready(self) -> bool:
        return self.ready


class FakeLoop:
    """Steps that wait for one handle each; its name and a number for each that has ended."""

    def __init__(self, name: str):
        self.name, self.handle, self.num_begun, self.is_idle = name, Handle(), 0, False
        self.runner = SimpleNamespace(compile_counter=SimpleNamespace(watch=nullcontext))
        self.scheduler = SimpleNamespace()

    def has_unfinished(self) -> bool:
        return not self.is_idle

    def advance(self, on_dispatch: object) -> Generator[Handle, None, str]:
        self.num_begun += 1
        yield self.handle
        return f"{self.name}{self.num_begun}"


def fake_replicas() -> tuple[Replicas, FakeLoop, FakeLoop]:
    slow, fast = FakeLoop("slow"), FakeLoop("fast")
    return Replicas(cast(list[StepLoop], [slow, fast])), slow, fast


def ended(both: Replicas) -> list[Any]:
    found: list[Any] = []
    both.advance(on_times=found.append)
    return found


def test_a_slow_replica_holds_up_no_other():
    both, slow, fast = fake_replicas()
    fast.handle.ready = True
    assert [ended(both) for _ in range(3)] == [["fast1"], ["fast2"], ["fast3"]] and slow.num_begun == 1
    slow.handle.ready = True
    assert ended(both) == ["slow1", "fast4"]


def test_who_is_done_late_lets_others_in():
    """While nobody is done it returns with nothing, and begins what has something to do by then."""
    both, slow, fast = fake_replicas()
    fast.is_idle = True
    assert ended(both) == [] == ended(both) and (slow.num_begun, fast.num_begun) == (1, 0)
    fast.is_idle, fast.handle.ready = False, True
    assert ended(both) == ["fast1"]
    one = FakeLoop("one")
    assert ended(Replicas(cast(list[StepLoop], [one]))) == ["one1"]  # which waits where it reads


def test_a_replica_that_hangs_is_waited_for_at_last(monkeypatch: pytest.MonkeyPatch):
    """So that a step that does not end is seen as one."""
    both, _slow, fast = fake_replicas()
    fast.handle.ready = True
    assert ended(both) == ["fast1"]
    monkeypatch.setattr(replicas, "PATIENCE_S", 0.0)
    assert ended(both) == ["slow1"]


def test_meshes_of_replicas():
    devices = jax.devices()
    parallel = parse_mesh("replica=2,tensor=2,stage=2")
    assert parallel == ParallelConfig(replica=2, stage=2, tensor=2) and parallel.num_devices == 8
    first, second = make_meshes(parallel)
    assert list(first.devices.flat) == devices[:4] and list(second.devices.flat) == devices[4:]
    given = Mesh(np.array(devices).reshape(4, 1, 2), ("replica", "stage", "tensor"))
    assert [list(m.devices.flat) for m in resolve_meshes(given, CONFIG)] == [devices[i : i + 2] for i in (0, 2, 4, 6)]


@pytest.mark.parametrize(
    "mesh, match",
    [
        ("replica=4,tensor=4", "mesh replica=4,stage=1,tensor=4 needs 16 devices, there are 8"),
        ("replica=0", "'0' is not a positive integer"),
        ("replica=2,replica=2", "expected each of replica, stage, tensor once at most"),
        ("replica=2,tensor=3", "num_kv_heads=4 is not divisible by tensor=3; of 3 devices a replica no mesh would fit"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh: str, match: str):
    with pytest.raises(ValueError, match=match):
        resolve_meshes(mesh, CONFIG)
    with pytest.raises(ValueError, match="mesh replica=2: one mesh is of replica=1"):
        make_mesh(ParallelConfig(replica=2))


def test_a_request_is_found_by_its_id_only_while_it_runs(two: Engine):
    add(two, "again", [9] * 5, greedy(2))
    finish(two)
    add(two, "again", [9] * 5, greedy(2))
    finish(two)
