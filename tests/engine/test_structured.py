"""Structured output through the engine: tokens are those of the oracle's logits under a brute-force mask, mixed with
requests that ask for nothing, whatever the lookahead, the mesh, the batch and the preemptions."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams, StructuredOutputs
from tests import tiny
from tests.constraint_reference import constrained_logits
from tests.oracle import oracle_logits

V = tiny.CONFIG.vocab_size
WORDS = ("b", "bcd", "bce \x7fx", "x{7}[\x01", "éa", "日本語", "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz")
# Of one length, because the oracle compiles for each; some share pages of 4.
PROMPTS = [(3 * tiny.prompts(9)[i])[:18] for i in (2, 0, 2, 4, 5, 2, 6, 7)]
CHOICE: dict[str, Any] = {"structured_outputs": {"choice": WORDS}}
CASES: list[dict[str, Any]] = [
    CHOICE,
    {},
    CHOICE | {"min_tokens": 3},
    CHOICE | {"logit_bias": {tiny.tokenizer().encode("z")[0]: 30.0}, "repetition_penalty": 1.2},
    {"presence_penalty": 1.5},
    CHOICE | {"bad_words": ("bc", "é"), "ignore_eos": True},
    CHOICE | {"allowed_token_ids": (*tiny.tokenizer().encode("bcd"), tiny.EOS)},
    {},
]


def next_bytes(text: bytes) -> tuple[set[int], bool]:
    """What may follow ``text`` in one of WORDS, as token ids, and whether it is one of them."""
    words = [w.encode() for w in WORDS]
    return {_id_of(w[len(text)]) for w in words if w.startswith(text) and len(w) > len(text)}, text in words


@cache
def _id_of(byte: int) -> int:
    return next(i for i in range(2, V - 1) if tiny.tokenizer().token_bytes(i) == bytes([byte]))


def masked_logits(logits: np.ndarray, request: Request, output: list[int]) -> np.ndarray:
    """[V] in float64 as all fields of ``request`` change them, structured output too."""
    x = constrained_logits(logits, request, output)
    if request.params.structured_outputs is None:
        return x
    ids, is_word = next_bytes(b"".join(map(tiny.tokenizer().token_bytes, output)))
    ids |= set(request.stop_token_ids) if is_word else set()
    return np.where(np.isin(np.arange(V), list(ids)), x, -np.inf)


def expected(request: Request) -> tuple[list[int], str]:
    output: list[int] = []
    structured = request.params.structured_outputs is not None
    while len(output) < (request.params.max_tokens or 0):
        text = b"".join(map(tiny.tokenizer().token_bytes, output))
        if structured and next_bytes(text) == (set(), True):
            return output, "stop"
        logits = oracle_logits(tiny.CONFIG, tiny.params(), [*request.prompt_token_ids, *output])[-1]
        x = masked_logits(logits, request, output)
        if np.isneginf(x).all():
            return output, "stop" if next_bytes(text)[1] else "abort"
        output.append(int(np.argmax(x)))
        if output[-1] in request.stop_token_ids:
            return output, "stop"
    complete = structured and next_bytes(b"".join(map(tiny.tokenizer().token_bytes, output))) == (set(), True)
    return output, "stop" if complete else "length"


def params(case: dict[str, Any]) -> SamplingParams:
    defaults: dict[str, Any] = {"temperature": 0, "max_tokens": 14}
    return SamplingParams(**(defaults | case))


@cache
def all_expected() -> list[tuple[list[int], str]]:
    with tiny.engine() as engine:
        return [expected(engine.make_request(p, params(c))) for p, c in zip(PROMPTS, CASES, strict=True)]


def test_the_cases_end_in_every_way():
    ends = [reason for _, reason in all_expected()]
    assert {"stop", "length"} <= set(ends) and len(all_expected()[2][0]) >= 3
    assert len({tuple(tokens) for tokens, _ in all_expected()}) >= 5


@pytest.mark.parametrize(
    "options",
    [{"lookahead": 0}, {"lookahead": 1}, {"mesh": "stage=2,tensor=2"}, {"num_pages": 24, "prefix_caching": False}],
    ids=str,
)
def test_mixed_in_one_batch(options):
    with tiny.engine(**options) as engine:
        listed = [params(c) for c in CASES]
        for _ in range(2):  # the second time with prompts from the prefix cache, in slots that others had
            got = engine.generate(PROMPTS, listed)
            assert [(c.token_ids, c.finish_reason) for c in got] == all_expected()
        alone = [engine.generate([p], s)[0] for p, s in zip(PROMPTS, listed, strict=True)]
        assert [(c.token_ids, c.finish_reason) for c in alone] == all_expected()
        assert engine.stats().recompilations_after_ready == 0 and engine.stats().num_pages_held == 0


def test_new_weights_and_preemptions_keep_the_place_in_the_grammar():
    with tiny.engine() as engine:
        requests = [engine.make_request(p, params(c)) for p, c in zip(PROMPTS, CASES, strict=True)]
        given: dict[str, list[int]] = {r.request_id: [] for r in requests}
        for request in requests:
            engine.add_request(request)
        for number in range(1000):
            if not engine.has_unfinished():
                break
            for event in engine.step():
                given[event.request_id] += [] if event.token_id is None else [event.token_id]
            if number % 4 == 3:
                engine.update_params(tiny.params())
        assert list(given.values()) == [tokens for tokens, _ in all_expected()]
        assert engine.stats().num_preemptions > 4


@pytest.fixture(scope="module")
def engine():
    with tiny.engine() as engine:
        yield engine


def test_every_choice_of_n_is_in_the_language(engine):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": [True, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    no_spaces = dict.fromkeys(tiny.tokenizer().encode(" \t\n\r"), -100.0)
    asked = SamplingParams(
        n=4, seed=3, max_tokens=60, logit_bias=no_spaces, structured_outputs=StructuredOutputs(json=schema)
    )
    completions = engine.generate([PROMPTS[0]], asked)
    complete = [c for c in completions if c.finish_reason == "stop"]
    assert len(complete) == 4 and len({c.text for c in completions}) > 1
    for completion in complete:
        value = json.loads(completion.text)
        assert 0 <= value["a"] <= 99 and value["b"] in (True, None) and set(value) == {"a", "b"}


def test_drawn_tokens_have_the_masked_distribution(engine):
    """The first token of 600 draws, under top_p, against the renormalised numpy distribution: within 5 sigma."""
    asked: dict[str, Any] = {
        "temperature": 1.4,
        "top_p": 0.97,
        "max_tokens": 1,
        "structured_outputs": {"regex": "[a-h]x+"},
    }
    request = engine.make_request(PROMPTS[1], SamplingParams(**asked))
    logits = oracle_logits(tiny.CONFIG, tiny.params(), list(request.prompt_token_ids))[-1].astype(np.float64)
    ids = [_id_of(b) for b in b"abcdefgh"]
    p = np.exp(logits[ids] / 1.4)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.97)) + 1]
    want = np.zeros(len(ids))
    want[kept] = p[kept] / p[kept].sum()
    num = 600
    drawn = engine.generate([PROMPTS[1]] * num, [SamplingParams(seed=s, **asked) for s in range(num)])
    counts = np.array([sum(c.token_ids == [i] for c in drawn) for i in ids])
    assert counts.sum() == num and (counts[want == 0] == 0).all()
    assert (np.abs(counts - num * want) <= 5 * np.sqrt(num * want * (1 - want) + 1e-9)).all()


def test_logprobs_are_raw(engine):
    (c,) = engine.generate([PROMPTS[0]], SamplingParams(temperature=0, logprobs=2, **CHOICE))
    logits = oracle_logits(tiny.CONFIG, tiny.params(), PROMPTS[0])[-1]
    raw = logits - np.log(np.sum(np.exp(logits)))
    assert c.logprobs[0].logprob == pytest.approx(raw[c.token_ids[0]], abs=1e-4)
    assert [i for i, _ in c.logprobs[0].top] == np.argsort(-raw)[:2].tolist()


def test_end_only_where_the_text_is_in_the_language(engine):
    ends = dict.fromkeys([tiny.EOS], 100.0)
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "logit_bias": ends}
    (c,) = engine.generate([PROMPTS[0]], SamplingParams(structured_outputs=StructuredOutputs(regex="a{3}b*"), **asked))
    assert c.text == "aaa" and c.token_ids[-1] == tiny.EOS and c.finish_reason == "stop"
    (c,) = engine.generate(
        [PROMPTS[0]], SamplingParams(structured_outputs=StructuredOutputs(regex="a{3}b*"), min_tokens=6, **asked)
    )
    assert c.text == "aaabbb" and c.token_ids[-1] == tiny.EOS
    (c,) = engine.generate(
        [PROMPTS[0]],
        SamplingParams(structured_outputs=StructuredOutputs(regex="a{3}"), min_tokens=6, ignore_eos=True, **asked),
    )
    assert (c.text, c.finish_reason, len(c.token_ids)) == ("aaa", "stop", 3)  # nothing else could follow
    (c,) = engine.generate(
        [PROMPTS[0]],
        SamplingParams(
            structured_outputs=StructuredOutputs(regex="a{3}b*"), stop_token_ids=(1,), ignore_eos=True, seed=1
        ),
    )
    assert c.text.startswith("aaa") and set(c.text[3:]) <= {"b"}


def test_stop_strings_end_a_text_before_its_grammar(engine):
    asked = SamplingParams(
        temperature=0, stop=("bb",), max_tokens=30, structured_outputs=StructuredOutputs(regex="ab{20}")
    )
    (c,) = engine.generate([PROMPTS[0]], asked)
    assert (c.text, c.finish_reason, c.stop_reason) == ("a", "stop", "bb")


def test_a_dead_end_is_told(engine):
    asked = SamplingParams(
        temperature=0, bad_words=("b",), max_tokens=30, structured_outputs=StructuredOutputs(regex="a{2}b")
    )
    before, (c,), after = (
        engine.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=5)),
        engine.generate([PROMPTS[0]], asked),
        engine.generate([PROMPTS[3]], SamplingParams(temperature=0, max_tokens=5)),
    )
    assert (c.text, c.finish_reason) == ("aa", "abort") and "let no token follow" in c.stop_reason
    assert before[0].token_ids == after[0].token_ids
    grammar = 'start: e\ne: e e | "a" | "b" | e "a" e | \n'  # each token costs more than the one before
    asked = SamplingParams(
        seed=1, ignore_eos=True, max_tokens=60, structured_outputs=StructuredOutputs(grammar=grammar)
    )
    (c,) = engine.generate([PROMPTS[0]], asked)
    assert set(c.text) <= {"a", "b"}
    assert c.finish_reason == "length" or c.stop_reason.startswith("structured_outputs: ")


def test_refused_at_the_door(engine):
    cases: list[tuple[Any, str]] = [
        ({"regex": "a("}, "regex: "),
        ({"regexp": "a"}, "'regexp' is not one of json, json_object, regex, choice, grammar"),
        ("a", "'a' has none of its fields"),
    ]
    for asked, match in cases:
        with pytest.raises(RequestError, match=f"^structured_outputs: {match}"):
            engine.make_request([5], SamplingParams(structured_outputs=asked))
