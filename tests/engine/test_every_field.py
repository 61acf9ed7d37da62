"""Field by field: setting it changes what is drawn exactly as a numpy reference says, and nothing else does.

Drawn is the token after the same prompt and a few output tokens, for many seeds, and counted: within 5 sigma of the
reference's probabilities, and never a token that it does not allow. Fields that end, cut or only tell have tables of
their own; the last test knows them all.
"""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams, StructuredOutputs
from tests import tiny
from tests.constraint_reference import constrained_logits
from tests.oracle import oracle_logits

NUM_DRAWS = 400
PROMPT = list(range(30, 50))
ALLOWED = tuple(range(60, 92))  # so few that each is often drawn
BASE: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "allowed_token_ids": ALLOWED, "ignore_eos": True}
LETTERS = [i for i in range(2, 258) if tiny.tokenizer().token_bytes(i) in (b"a", b"b", b"c", b"d")]

FIELDS: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"temperature": 0.0}, {"temperature": 0.4}, {"temperature": 3.0}],
    "top_p": [{"top_p": 0.5}, {"top_p": 0.05}],
    "top_k": [{"top_k": 1}, {"top_k": 6}],
    "min_p": [{"min_p": 0.3}],
    "logit_bias": [{"logit_bias": {61: 3.0, 70: -100.0}}],
    "allowed_token_ids": [{"allowed_token_ids": (5, 9, 200)}],
    "bad_words": [{"bad_words": (tiny.tokenizer().decode([61]), tiny.tokenizer().decode([64]))}],
    "repetition_penalty": [{"repetition_penalty": 3.0}, {"repetition_penalty": 0.3}],
    "presence_penalty": [{"presence_penalty": 2.0}],
    "frequency_penalty": [{"frequency_penalty": 2.0}, {"frequency_penalty": -2.0}],
    "min_tokens": [{"min_tokens": 4, "ignore_eos": False, "allowed_token_ids": (*ALLOWED, tiny.EOS)}],
    "ignore_eos": [{"ignore_eos": False, "allowed_token_ids": (*ALLOWED, tiny.EOS)}],
    "structured_outputs": [
        {"allowed_token_ids": None, "structured_outputs": StructuredOutputs(regex="[abc]{4}x*")},
        {"allowed_token_ids": None, "structured_outputs": StructuredOutputs(choice=("aaaa", "aaab", "aaad", "b"))},
    ],
    "truncate_prompt_tokens": [{"truncate_prompt_tokens": 7}],
}
LOOKS_BACK = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
COUNTED_ELSEWHERE = {
    "max_tokens", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "logprobs", "skip_special_tokens",
    "n", "prompt_logprobs", "stream_interval", "stream_max_delay_s",
}  # fmt: skip  # tests/engine: test_requests, test_choices, test_asides, test_event_stream

CASES = [pytest.param(name, asked, id=f"{name}-{i}") for name, all_asked in FIELDS.items()
         for i, asked in enumerate(all_asked)]  # fmt: skip


def sampling(asked: dict[str, Any]) -> SamplingParams:
    merged: dict[str, Any] = BASE | asked
    return SamplingParams(**merged)


def probabilities(request: Request, output: list[int]) -> np.ndarray:
    """[V] in float64: by the definitions of the fields, in the order that SamplingParams states."""
    params = request.params
    logits = oracle_logits(tiny.CONFIG, tiny.params(), [*request.prompt_token_ids, *output])[-1]
    x = constrained_logits(logits, request, output)
    if params.structured_outputs is not None:
        follow = _may_follow(params.structured_outputs, output)
        x[[i for i in range(len(x)) if i not in follow]] = -np.inf
    if params.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(np.float64)
    x = x / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if params.top_k > 0:
        p = np.where(p >= np.sort(p)[-params.top_k], p, 0)
        p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        p /= p.sum()
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


def _may_follow(structured: StructuredOutputs, output: list[int]) -> list[int]:
    """Of the two languages of FIELDS, at their beginning."""
    assert not output
    a, b, c, _ = LETTERS
    return [a, b, c] if structured.kind == "regex" else [a, b]


def draw(engine: Any, asked: dict[str, Any], output: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts [V] of the token after ``output``, and its
    probabilities."""
    params = [sampling({"seed": seed} | asked) for seed in range(NUM_DRAWS)]
    requests = [engine.make_request(PROMPT, p) for p in params]
    counts = np.zeros(tiny.CONFIG.vocab_size)
    for completion in engine.generate([PROMPT] * NUM_DRAWS, params):
        counts[completion.token_ids[len(output)]] += 1
    return counts, probabilities(requests[0], output)


def assert_drawn_from(counts: np.ndarray, p: np.ndarray) -> None:
    assert counts.sum() == NUM_DRAWS and not counts[p == 0].any()
    spread = np.sqrt(NUM_DRAWS * p * (1 - p))
    assert (np.abs(counts - NUM_DRAWS * p) <= 5 * spread + 1e-6).all()


@pytest.fixture(scope="module")
def engine():
    with tiny.engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def base(engine) -> np.ndarray:
    counts, p = draw(engine, {}, [])
    assert_drawn_from(counts, p)
    return p


@pytest.mark.parametrize(("name", "asked"), [case for case in CASES if case.values[0] not in LOOKS_BACK])
def test_the_first_token(engine, base: np.ndarray, name: str, asked: dict[str, Any]):
    counts, p = draw(engine, asked, [])
    assert np.abs(p - base).sum() > 0.02, f"{name} changes nothing"
    assert_drawn_from(counts, p)


@pytest.mark.parametrize(("name", "asked"), [case for case in CASES if case.values[0] in LOOKS_BACK])
def test_the_token_after_others(engine, name: str, asked: dict[str, Any]):
    """Many draws, each with an output of its own: what is expected is the sum of every draw's probabilities."""
    num, length = 250, 4
    prompts = [PROMPT] * num
    params = [sampling({"seed": s, "max_tokens": length} | asked) for s in range(num)]
    neutral = sampling({"max_tokens": length} | {k: v for k, v in asked.items() if k != name})
    counts, expected, variance, change = (np.zeros(tiny.CONFIG.vocab_size) for _ in range(4))
    known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    plain = engine.make_request(PROMPT, neutral)
    for completion, one in zip(engine.generate(prompts, params), params, strict=True):
        request = engine.make_request(PROMPT, one)
        for i in range(min(length, len(completion.token_ids))):
            before = tuple(completion.token_ids[:i])
            if i > 1 and len(known) > 150:
                break  # the reference is slow: enough is known
            if before not in known:
                known[before] = probabilities(request, list(before)), probabilities(plain, list(before))
            p, without = known[before]
            assert p[completion.token_ids[i]] > 0
            counts[completion.token_ids[i]] += 1
            expected += p
            variance += p * (1 - p)
            change += np.abs(p - without)
    assert change.sum() > 1, f"{name} changes nothing"
    assert (np.abs(counts - expected) <= 5 * np.sqrt(variance) + 1e-6).all()


def test_the_tables_know_every_field():
    assert set(FIELDS) | COUNTED_ELSEWHERE == {f.name for f in fields(SamplingParams)}
    assert not set(FIELDS) & COUNTED_ELSEWHERE
