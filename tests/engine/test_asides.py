"""Log-probabilities of prompts and of whole vocabularies, and embeddings: against the oracle, in chunks, whatever the
batch, the mesh, the prefix cache and the preemptions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.model.params import Params, init_params
from jaxserve.request import TokenLogprobs
from jaxserve.sampling_params import MAX_ALL_LOGPROBS, SamplingParams
from tests import tiny
from tests.oracle import oracle_logits

PROMPTS = [*tiny.prompts(6, seed=4, longest=60), [7], list(range(50, 67))]  # the last has 17: a chunk, and one token
ASKED: list[dict[str, Any]] = [
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 3, "logprobs": -1},
    {},
    {"prompt_logprobs": -1, "logprobs": 2},
    {"logprobs": -1},
    {"prompt_logprobs": 20, "temperature": 1.0, "seed": 4, "repetition_penalty": 1.4},
    {"prompt_logprobs": 2},
    {"prompt_logprobs": 2},
]
OPTIONS = [{}, {"lookahead": 0}, {"mesh": "stage=2,tensor=2"}, {"num_pages": 24}, {"mesh": "stage=4", "num_pages": 24}]


def logprobs_after(tokens: Sequence[int], params: Params | None = None) -> np.ndarray:
    """[T, V]: of what follows each of ``tokens``."""
    logits = oracle_logits(tiny.CONFIG, params or tiny.params(), list(tokens))
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def check(entry: TokenLogprobs | None, token: int, k: int, row: np.ndarray) -> None:
    assert entry is not None and entry.token_id == token
    assert entry.logprob == pytest.approx(row[token], abs=2e-4)
    ids, values = [i for i, _ in entry.top], [v for _, v in entry.top]
    assert len(ids) == len(set(ids)) == (len(row) if k == -1 else k)
    np.testing.assert_allclose(values, row[ids], atol=2e-4)
    np.testing.assert_allclose(values, -np.sort(-row)[: len(ids)], atol=2e-4)


def check_all(prompt: Sequence[int], params: SamplingParams, completion: Any) -> None:
    rows = logprobs_after([*prompt, *completion.token_ids])
    if params.prompt_logprobs is None:
        assert completion.prompt_logprobs is None
    else:
        assert len(completion.prompt_logprobs) == len(prompt) and completion.prompt_logprobs[0] is None
        for i, entry in enumerate(completion.prompt_logprobs[1:], 1):
            check(entry, prompt[i], params.prompt_logprobs, rows[i - 1])
    if params.logprobs is None:
        assert completion.logprobs is None
    else:
        for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            check(entry, token, params.logprobs, rows[len(prompt) + i - 1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_log_probabilities_are_the_oracles(options):
    defaults: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    listed = [SamplingParams(**(defaults | asked)) for asked in ASKED]
    with tiny.engine(**options) as engine:
        for _ in range(2):  # the second time everything is in the prefix cache
            completions = engine.generate(PROMPTS, listed)
            for prompt, params, completion in zip(PROMPTS, listed, completions, strict=True):
                check_all(prompt, params, completion)
                assert completion.cached_tokens == 0 or params.prompt_logprobs is None
        assert engine.stats().prefix_cache_hits > 0
        assert (engine.stats().num_preemptions > 0) == ("num_pages" in options)
        assert engine.stats().recompilations_after_ready == 0 and engine.stats().num_pages_held == 0


@cache
def other() -> Params:
    return init_params(tiny.CONFIG, jax.random.key(8))


@pytest.fixture(scope="module")
def engine():
    with tiny.engine() as engine:
        yield engine


def test_the_first_of_n_choices_has_the_prompts(engine):
    prompt = PROMPTS[0]
    asked = SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    completions = engine.generate([prompt], asked)
    assert [c.prompt_logprobs is not None for c in completions] == [True, False, False]
    check_all(prompt, asked, completions[0])
    events = list(engine.stream(prompt, asked))
    assert [(e.choice, e.index) for e in events if e.prompt_logprobs] == [(0, 0)]
    assert completions[1].cached_tokens == completions[2].cached_tokens == (len(prompt) - 1) // 4 * 4


@pytest.mark.parametrize("num_steps", [1, 2])
def test_new_weights_score_the_prompt_anew(num_steps):
    prompt = (2 * PROMPTS[7])[:33]
    with tiny.engine() as engine:
        request = engine.make_request(prompt, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0))
        mean = engine.make_embedding_request(prompt, pooling="mean", normalize=False)
        engine.add_request(request)
        engine.add_request(mean)
        for _ in range(num_steps):  # of three chunks and a half
            assert engine.step() == []
        engine.update_params(other())
        events = [e for _ in range(40) if engine.has_unfinished() for e in engine.step()]
    rows = logprobs_after(prompt, other())
    (scored,) = [e.prompt_logprobs for e in events if e.prompt_logprobs]
    for i, entry in enumerate(scored[1:], 1):
        check(entry, prompt[i], 0, rows[i - 1])
    (values,) = [e.embedding for e in events if e.embedding is not None]
    np.testing.assert_allclose(values, hidden_states(prompt, other()).mean(axis=0), atol=2e-4)


def hidden_states(tokens: Sequence[int], params: Params | None = None) -> np.ndarray:
    """[T, D] after the final norm: the oracle's logits of a head that is the identity."""
    eye = np.eye(tiny.CONFIG.hidden_size, dtype=np.float32)
    return oracle_logits(tiny.CONFIG, replace(params or tiny.params(), head=eye), list(tokens))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_embeddings_are_the_oracles_hidden_states(options):
    with tiny.engine(**options) as engine:
        running = engine.stream(PROMPTS[1], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        first = next(running).token_id
        for _ in range(2):
            for pooling in ("last", "mean"):
                for normalize in (True, False):
                    got = engine.embed(PROMPTS, pooling=pooling, normalize=normalize)
                    for prompt, embedding in zip(PROMPTS, got, strict=True):
                        states = hidden_states(prompt)
                        want = states[-1] if pooling == "last" else states.mean(axis=0)
                        want = want / np.linalg.norm(want) if normalize else want
                        assert embedding.values.dtype == np.float32 and embedding.prompt_len == len(prompt)
                        np.testing.assert_allclose(embedding.values, want, atol=2e-4)
        tokens = [first, *(e.token_id for e in running)]
        (alone,) = engine.generate([PROMPTS[1]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        assert tokens == alone.token_ids
        assert engine.stats().recompilations_after_ready == 0 and engine.stats().num_pages_held == 0


def test_one_text_is_an_embedding_too(engine):
    (embedding,) = engine.embed("some text", truncate_prompt_tokens=4)
    (same,) = engine.embed([tiny.tokenizer().encode("text")])
    np.testing.assert_array_equal(embedding.values, same.values)
    assert np.linalg.norm(embedding.values) == pytest.approx(1)
    (event,) = list(drained(engine, engine.make_embedding_request("some text")))
    assert event.ends_request and event.token_id is None and event.finish_reason == "stop" and event.text == ""
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (9, 0)


def drained(engine, request):
    engine.add_request(request)
    while engine.has_unfinished():
        yield from engine.step()


def test_aborted_before_they_are_read(engine):
    prompt = PROMPTS[7]
    for request in (
        engine.make_request(prompt, SamplingParams(prompt_logprobs=1, logprobs=-1, max_tokens=3), request_id="a"),
        engine.make_embedding_request(prompt, pooling="mean", request_id="a"),
    ):
        engine.add_request(request)
        engine.step()
        assert engine.abort("a")
        assert [e.finish_reason for _ in range(5) if engine.has_unfinished() for e in engine.step()] == ["abort"]
    assert engine.stats().num_pages_held == 0


async def test_embeddings_beside_streams():
    async_engine = AsyncEngine(tiny.engine)
    await async_engine.ready()
    try:
        request = async_engine.engine.make_embedding_request(PROMPTS[0])
        embedding = await async_engine.embed(request)
        np.testing.assert_allclose(
            embedding.values / np.linalg.norm(embedding.values),
            hidden_states(PROMPTS[0])[-1] / np.linalg.norm(hidden_states(PROMPTS[0])[-1]),
            atol=2e-4,
        )
    finally:
        assert await async_engine.close()


def test_refused_by_name(engine):
    limits: list[tuple[dict[str, Any], str]] = [
        ({"prompt_logprobs": 21}, "prompt_logprobs: 21 is more than max_logprobs=20; -1 is all"),
        ({"logprobs": 21}, "logprobs: 21 is more than max_logprobs=20; -1 is all"),
        ({"prompt_logprobs": -2}, "prompt_logprobs: -2 must be -1"),
        ({"logprobs": -1, "n": 500}, f"logprobs: all 259 of 47500 tokens, at most {MAX_ALL_LOGPROBS} values"),
    ]
    for asked, match in limits:
        with pytest.raises(RequestError, match=f"^{match}"):
            engine.make_request([5], SamplingParams(**asked))
    with pytest.raises(RequestError, match=r"^pooling: 'max' is not one of last, mean"):
        engine.embed([[5]], pooling=cast(Any, "max"))
    with pytest.raises(RequestError, match=r"^prompt: is empty"):
        engine.embed([[5], []])
