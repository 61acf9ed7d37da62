"""Constrained requests through the engine: greedy tokens are those of the oracle's logits as the reference changes
them, whatever the lookahead, the mesh, the batch and the preemptions."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxserve.constraint_io import MAX_BAD_LEN, MAX_BAD_SEQUENCES, MAX_BIASES
from jaxserve.engine.constraints import check_constraints
from jaxserve.errors import RequestError
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from tests import tiny
from tests.constraint_reference import constrained_logits
from tests.oracle import oracle_logits

NUM_TOKENS = 14
V = tiny.CONFIG.vocab_size
FREE: dict[str, Any] = {}  # what is asked besides, by nobody
# Of each other's prompts, so that prefixes are shared; most are longer than a page of 4.
PROMPTS = [tiny.prompts(7)[i] for i in (2, 0, 2, 4, 2, 5, 2, 6)]
CASES: list[dict[str, Any]] = [
    FREE,
    {"repetition_penalty": 1.8},
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"frequency_penalty": -2.0, "presence_penalty": -2.0},
    {"logit_bias": {40: 1.5, 41: -1.5, 191: -100}},
    {"allowed_token_ids": tuple(range(100, 108)), "frequency_penalty": 0.3, "min_tokens": 5, "ignore_eos": False},
    {"bad_words": "words"},  # of what the free run says: two tokens each, so that the last one in flight matters
    {"repetition_penalty": 1.3, "logit_bias": {50: 1.0}, "bad_words": ("\x8f",)},
]


def expected_tokens(request: Request) -> list[int]:
    output: list[int] = []
    for _ in range(NUM_TOKENS):
        logits = oracle_logits(tiny.CONFIG, tiny.params(), [*request.prompt_token_ids, *output])[-1]
        output.append(int(np.argmax(constrained_logits(logits, request, output))))
        if output[-1] in request.stop_token_ids:
            break
    return output


def params(case: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | case))


@cache
def expected() -> tuple[list[SamplingParams], list[list[int]]]:
    """The params of each case, and the tokens that it must give."""
    listed, tokens = [], []
    with tiny.engine() as engine:
        free = expected_tokens(engine.make_request(PROMPTS[6], params(FREE)))
        pairs = [tiny.tokenizer().decode([a, b]) for a, b in zip(free[::2], free[1::2]) if 2 <= min(a, b) < 130]
        for prompt, case in zip(PROMPTS, CASES, strict=True):
            if case.get("bad_words") == "words":
                case = {"bad_words": tuple(pairs)}
            listed.append(params(case))
            tokens.append(expected_tokens(engine.make_request(prompt, listed[-1])))
            (unconstrained,) = engine.generate([prompt], params(FREE))
            assert (tokens[-1] == unconstrained.token_ids) == (case is FREE), f"{case} changes nothing"
    return listed, tokens


@pytest.mark.parametrize(
    "options",
    [
        {"lookahead": 0},
        {"lookahead": 1},
        {"lookahead": 2},
        {"mesh": "stage=2,tensor=2"},
        {"num_pages": 24, "prefix_caching": False},
    ],
    ids=str,
)
def test_every_field_in_one_batch(options):
    listed, tokens = expected()
    with tiny.engine(**options) as engine:
        for _ in range(2):  # the second time with prompts from the prefix cache, in slots that others had
            assert [c.token_ids for c in engine.generate(PROMPTS, listed)] == tokens
        one_by_one = [engine.generate([p], s)[0].token_ids for p, s in zip(PROMPTS, listed, strict=True)]
        assert one_by_one == tokens
        assert (engine.stats().num_preemptions > 0) == ("num_pages" in options and engine.cache_config.num_pages == 24)
        assert engine.stats().recompilations_after_ready == 0


@pytest.fixture(scope="module")
def engine():
    with tiny.engine() as engine:
        yield engine


def test_drawn_tokens_stay_within_what_is_allowed(engine):
    allowed = (7, 70, 170, 258)
    asked = SamplingParams(
        temperature=2.0, top_p=0.9, seed=3, max_tokens=40, allowed_token_ids=allowed, logit_bias={70: -100}, logprobs=2
    )
    (completion,) = engine.generate([PROMPTS[0]], asked)
    assert set(completion.token_ids) == set(allowed) - {70}
    logits = oracle_logits(tiny.CONFIG, tiny.params(), PROMPTS[0])[-1]
    raw = logits - np.log(np.sum(np.exp(logits)))
    assert completion.logprobs[0].logprob == pytest.approx(raw[completion.token_ids[0]], abs=1e-4)
    assert [i for i, _ in completion.logprobs[0].top] == np.argsort(-raw)[:2].tolist()


def test_bad_words_are_never_in_the_text(engine):
    words = ("a", "bc", "é")
    asked = SamplingParams(
        seed=1,
        temperature=1.0,
        max_tokens=80,
        bad_words=words,
        allowed_token_ids=tuple(tiny.tokenizer().encode("abc dé")),
        ignore_eos=True,
    )
    for completion in engine.generate(["abc a bc"] * 4, [asked, *[SamplingParams(seed=i) for i in range(3)]])[:1]:
        assert len(completion.token_ids) == 80 and not any(word in completion.text for word in words)


def test_bad_words_are_read_with_and_without_a_space(engine):
    # Bytes are the tokens here: " ab" ends with "ab", which forbids it.
    request = engine.make_request([5], SamplingParams(bad_words=("ab", " x", "ab")))
    assert request.bad_sequences == (tuple(tiny.tokenizer().encode("ab")), tuple(tiny.tokenizer().encode("x")))


def test_truncated_prompts(engine):
    prompt = tiny.prompts(7)[2]
    (cut,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=5))
    (short,) = engine.generate([prompt[-5:]], SamplingParams(temperature=0, max_tokens=4))
    assert (cut.token_ids, cut.prompt_len) == (short.token_ids, 5)
    longer_than_the_model = engine.make_request("x" * 1000 + "end", SamplingParams(truncate_prompt_tokens=3))
    assert longer_than_the_model.prompt_token_ids == tuple(tiny.tokenizer().encode("end"))
    assert len(engine.make_request([5, 6], SamplingParams(truncate_prompt_tokens=3)).prompt_token_ids) == 2
    with pytest.raises(RequestError, match="prompt: 96 tokens leave no room for output in max_model_len=96"):
        engine.make_request([5] * 200, SamplingParams(truncate_prompt_tokens=96))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"allowed_token_ids": (5, 259)}, "allowed_token_ids: 259 is not below the vocabulary's 259"),
        ({"logit_bias": {259: 1.0}}, "logit_bias: 259 is not below the vocabulary's 259"),
        ({"bad_words": ("x" * 17,)}, f"bad_words: a word of 17 tokens, at most {MAX_BAD_LEN} are taken"),
        (
            {"bad_words": tuple(f"{i:03}" for i in range(129))},
            f"bad_words: 129 sequences .* at most {MAX_BAD_SEQUENCES}",
        ),
        (
            {"bad_words": ("a",), "allowed_token_ids": tuple(tiny.tokenizer().encode("a"))},
            "bad_words: forbids 1 tokens and may leave 0 of the 1 that are allowed",
        ),
        (
            {"bad_words": ("xa", "b"), "allowed_token_ids": tuple(tiny.tokenizer().encode("ab"))},
            "bad_words: forbids 2 tokens and may leave 0 of the 2 that are allowed",
        ),
        (
            {"allowed_token_ids": (tiny.EOS, 9), "stop_token_ids": (9,), "min_tokens": 1},
            "min_tokens: forbids 2 tokens and may leave 0 of the 2 that are allowed",
        ),
    ],
)
def test_refused_with_both_numbers(engine, asked, match):
    with pytest.raises(RequestError, match=f"^{match}"):
        engine.make_request([5], SamplingParams(**asked))


def test_too_many_biases():
    asked = SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES + 1), 1.0))
    with pytest.raises(RequestError, match=f"^logit_bias: {MAX_BIASES + 1} token ids, at most {MAX_BIASES} are taken"):
        check_constraints(asked, (), (), vocab_size=10_000)


def test_refused_by_engines_without():
    with tiny.engine(samplings=("greedy",), decode_sizes=(4,)) as greedy:
        for name, value in {
            "logit_bias": {5: 1.0},
            "allowed_token_ids": (5,),
            "bad_words": ("x",),
            "presence_penalty": 1.0,
            "frequency_penalty": 1.0,
            "repetition_penalty": 2.0,
            "structured_outputs": {"regex": "a"},
        }.items():
            with pytest.raises(RequestError, match=f"^{name}: .* needs sampling 'constrained', this engine has 'gre"):
                greedy.make_request([5], SamplingParams(temperature=0, **{name: value}))
        assert not greedy.make_request([5], SamplingParams(temperature=0, logit_bias={}, bad_words=())).is_constrained


def test_constraints_survive_new_weights():
    """``update_params`` preempts everybody: whoever returns brings its output, one token of it in flight."""
    listed, tokens = expected()
    with tiny.engine() as engine:
        requests = [engine.make_request(p, s) for p, s in zip(PROMPTS, listed, strict=True)]
        for request in requests:
            engine.add_request(request)
        given: dict[str, list[int | None]] = {request.request_id: [] for request in requests}
        for number in range(1000):
            if not engine.has_unfinished():
                break
            for event in engine.step():
                given[event.request_id].append(event.token_id)
            if number % 5 == 4:
                engine.update_params(tiny.params())
        assert list(given.values()) == tokens and engine.stats().num_preemptions > 4
