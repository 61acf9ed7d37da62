"""Greedy tokens of the engine, however it batches, chunks, shares, preempts or shards, are those of the oracle."""

import math
import random
from functools import cache

import numpy as np
import pytest

from jaxserve.engine import loop
from jaxserve.sampling_params import SamplingParams
from tests import tiny
from tests.oracle import oracle_greedy, oracle_logits

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@cache
def expected() -> list[list[int]]:
    return [oracle_greedy(tiny.CONFIG, tiny.params(), p, NUM_TOKENS) for p in tiny.prompts(7)]


def tokens(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


@pytest.mark.parametrize(
    "mesh",
    # The last one has more devices than kv heads; three stages have two layers, one and one.
    ["stage=1,tensor=1", "tensor=2", "stage=2", "stage=3,tensor=2", "tensor=4", "stage=4,tensor=2", "tensor=8"],
)
def test_every_mesh(mesh):
    with tiny.engine(mesh=mesh) as engine:
        assert tokens(engine.generate(tiny.prompts(7), GREEDY)) == expected()
        assert engine.stats().recompilations_after_ready == 0
        assert engine.stats().num_pages_held == 0


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_batched_is_one_by_one(lookahead, monkeypatch):
    monkeypatch.setattr(loop, "SHORT_WAIT_S", math.inf)
    with tiny.engine(lookahead=lookahead, prefix_caching=False) as engine:
        assert tokens(engine.generate(tiny.prompts(7), GREEDY)) == expected()
        assert tokens([engine.generate([p], GREEDY)[0] for p in tiny.prompts(7)]) == expected()


@pytest.mark.parametrize("short_wait_s, deepest", [(math.inf, 2), (0, 1)])
def test_a_second_step_is_ahead_where_the_host_waits_shortly(short_wait_s, deepest, monkeypatch):
    monkeypatch.setattr(loop, "SHORT_WAIT_S", short_wait_s)
    with tiny.engine(lookahead=2) as engine:
        unread = engine.loop.in_flight
        for prompt in tiny.prompts(7):
            engine.add_request(engine.make_request(prompt, GREEDY))
        depths = set()
        while engine.has_unfinished():
            engine.step()
            depths.add(len(unread))
            assert len(unread) < 2 or not any(step.batch.bucket.prefill_tokens for step in unread)
        assert max(depths) == deepest
        assert engine.stats().num_pages_held == 0


def test_any_order_of_rows():
    with tiny.engine() as engine:
        for seed in range(3):
            order = random.Random(seed).sample(range(7), 7)
            out = tokens(engine.generate([tiny.prompts(7)[i] for i in order], GREEDY))
            assert out == [expected()[i] for i in order]


def test_preempted_is_not_preempted():
    with tiny.engine(num_pages=24, max_model_len=96, prefix_caching=False) as engine:
        assert tokens(engine.generate(tiny.prompts(7), GREEDY)) == expected()
        assert engine.stats().num_preemptions > 0


def test_prefix_cached_is_cold():
    with tiny.engine() as engine:
        first = engine.generate(tiny.prompts(7), GREEDY)
        second = engine.generate(tiny.prompts(7), GREEDY)
        assert tokens(first) == tokens(second) == expected()
        assert [c.cached_tokens for c in first] == [0] * 7
        longest = max(range(7), key=lambda i: len(tiny.prompts(7)[i]))
        assert second[longest].cached_tokens == (len(tiny.prompts(7)[longest]) - 1) // 4 * 4 > 0


@pytest.mark.parametrize("page_size, prefill_sizes", [(1, (5,)), (16, (8, 32)), (7, (2, 6))])
def test_any_page_and_chunk_size(page_size, prefill_sizes):
    with tiny.engine(page_size=page_size, prefill_sizes=prefill_sizes, num_pages=400 // page_size) as engine:
        assert tokens(engine.generate(tiny.prompts(7), GREEDY)) == expected()


def test_static_batching_and_allocation():
    with tiny.engine(batching="static", allocation="static") as engine:
        assert tokens(engine.generate(tiny.prompts(7), GREEDY)) == expected()


def test_logprobs_are_of_the_raw_distribution():
    prompt = tiny.prompts(7)[2]
    params = SamplingParams(temperature=0.5, top_k=3, seed=11, max_tokens=6, ignore_eos=True, logprobs=4)
    with tiny.engine() as engine:
        (completion,) = engine.generate([prompt], params)
    logits = oracle_logits(tiny.CONFIG, tiny.params(), prompt + completion.token_ids)[len(prompt) - 1 : -1]
    want = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    assert completion.logprobs is not None and len(completion.logprobs) == 6
    for row, token, got in zip(want, completion.token_ids, completion.logprobs, strict=True):
        assert got.token_id == token
        assert got.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.argsort(-row)[:4]
        assert [i for i, _ in got.top] == best.tolist()
        assert [v for _, v in got.top] == pytest.approx(row[best], abs=1e-4)


def test_bfloat16_is_near():
    prompts = tiny.prompts(7)[:3]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    with tiny.engine(dtype="bfloat16") as engine:
        completions = engine.generate(prompts, params)
        assert engine.dtype == "bfloat16"
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = oracle_logits(tiny.CONFIG, tiny.params(), prompt)[-1]
        want = logits - np.log(np.sum(np.exp(logits)))
        assert completion.logprobs is not None
        assert completion.logprobs[0].logprob == pytest.approx(want[completion.token_ids[0]], abs=0.1)
        assert want[completion.token_ids[0]] > want.max() - 0.2
