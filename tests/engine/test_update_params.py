"""New weights in a running engine: the next token is theirs, nothing is compiled, nothing old is found again."""

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.model.params import Params, TreeSource, init_params
from tests import compiled, tiny
from tests.checkpoint.live_checkpoint import LiveCheckpoint
from tests.halt import Halt

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PROMPTS = tiny.prompts(5, seed=3)


@pytest.fixture(scope="module")
def other() -> Params:
    return init_params(tiny.CONFIG, jax.random.key(8))


@pytest.fixture(scope="module")
def fresh(other: Params):
    """An engine that has never known other weights."""
    with Engine.from_params(tiny.CONFIG, other, max_model_len=96, max_num_seqs=4, num_pages=96, page_size=4,
                            prefill_sizes=(16,), max_prefill_rows=3,
                            compilation_cache_dir=compiled.FOLDER) as engine:  # fmt: skip
        yield engine


def tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [c.token_ids for c in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("mesh", [None, "stage=2,tensor=2"])
def test_tokens_are_those_of_the_new_weights(mesh: str | None, other: Params, fresh: Engine):
    with tiny.engine(mesh=mesh) as engine:
        before = tokens(engine, PROMPTS)
        hits = engine.stats().prefix_cache_hits
        engine.update_params(other)
        assert engine.stats().num_pages_cached == 0
        assert tokens(engine, PROMPTS) == tokens(fresh, PROMPTS) != before
        assert engine.stats().prefix_cache_hits == hits
        engine.update_params(TreeSource(jax.tree.map(np.asarray, tiny.params()), tiny.CONFIG))
        assert tokens(engine, PROMPTS) == before
        assert engine.stats().recompilations_after_ready == 0


@pytest.mark.parametrize("lookahead, mesh", [(0, None), (1, None), (2, None), (1, "stage=4")])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_running_requests_go_on_with_the_new_weights(
    num_steps: int, lookahead: int, mesh: str | None, other: Params, fresh: Engine
):
    """The first tokens stay, the others are the new model's continuation of them: no old K/V is left, and no step goes
    through old layers and new ones."""
    with tiny.engine(lookahead=lookahead, mesh=mesh) as engine:
        requests = [engine.make_request(p, GREEDY) for p in PROMPTS]
        said: dict[str, list[int]] = {r.request_id: [] for r in requests}
        for request in requests:
            engine.add_request(request)

        def step() -> None:
            for event in engine.step():
                said[event.request_id] += [] if event.token_id is None else [event.token_id]

        for _ in range(num_steps):
            step()
        batches = [*engine.loop.stages.batches(), *(step.batch for step in engine.loop.in_flight)]
        pending = Counter(row.sequence.request_id for batch in batches for row in batch.rows if row.samples)
        old_tokens = [len(said[r.request_id]) + pending[r.request_id] for r in requests]
        engine.update_params(other)
        while engine.has_unfinished():
            step()
        for request, prompt, num_old in zip(requests, PROMPTS, old_tokens):
            got = said[request.request_id]
            left = replace(GREEDY, max_tokens=len(got) - num_old)
            assert len(got) == 20
            assert fresh.generate([[*prompt, *got[:num_old]]], left)[0].token_ids == got[num_old:]
        assert engine.stats().recompilations_after_ready == 0
        assert engine.stats().num_pages_held == 0


def test_what_does_not_match_is_named_and_changes_nothing(other: Params):
    with tiny.engine() as engine:
        before = tokens(engine, PROMPTS)
        wrong = replace(other.layers[2], down=np.zeros((32, 50), np.float32))
        for params, named in [
            (replace(other, layers=(*other.layers[:2], wrong, other.layers[3])),
             r"params\.layers\.2\.down has shape \(32, 50\), expected \(32, 48\)"),
            (replace(other, head=None), r"params\.head is missing, expected shape \(259, 32\)"),
            (replace(other, positions=np.zeros((256, 32))), r"params\.positions is not a parameter of this model"),
            (LiveCheckpoint(replace(tiny.CONFIG, vocab_size=300)),
             r"params\.embed has shape \(300, 32\), expected \(259, 32\)"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=named):
                engine.update_params(params)
        assert tokens(engine, PROMPTS) == before
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.update_params(other)


async def test_between_the_steps_of_a_server(other: Params, fresh: Engine):
    async_engine = AsyncEngine(tiny.engine)
    await async_engine.ready()
    try:
        halt = Halt(async_engine.engine, lambda stats: stats.generation_tokens > 2)
        request = async_engine.engine.make_request(PROMPTS[0], GREEDY)

        async def tokens_of_it() -> list[int]:
            return [e.token_id async for e in async_engine.stream(request) if e.token_id is not None]

        reading = asyncio.create_task(tokens_of_it())
        await halt.reached()
        updating = asyncio.create_task(async_engine.update_params(other))
        await asyncio.sleep(0)  # lets it start
        halt.end()
        await updating
        said = await reading
        continued = range(1, 20)  # of them some were sampled before the update was asked for
        assert any(
            fresh.generate([[*PROMPTS[0], *said[:k]]], replace(GREEDY, max_tokens=20 - k))[0].token_ids == said[k:]
            for k in continued
        )
        with pytest.raises(ValueError, match=r"params\.head is missing"):
            await async_engine.update_params(replace(other, head=None))
        assert async_engine.state == "ready"
    finally:
        assert await async_engine.close()


def test_weights_are_read_from_a_checkpoint_while_the_engine_runs(tmp_path):
    from tests.families.golden import FOLDER

    folder = FOLDER / "llama"
    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 1, "prefill_sizes": (8,), "samplings": ("greedy",)}
    with Engine.from_pretrained(folder, num_pages=8, dtype="float32", **options) as engine:
        prompt = [5, 6, 7]
        before = tokens(engine, [prompt])
        engine.update_params(jax.tree.map(lambda x: jax.device_put(0 * x, x.sharding), engine.load_params(folder)))
        assert tokens(engine, [prompt]) != before
        engine.update_params(engine.load_params(folder))
        assert tokens(engine, [prompt]) == before
        with pytest.raises(ValueError, match="nothing"):
            engine.load_params(tmp_path / "nothing")
