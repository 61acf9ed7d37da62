"""Structured output on the host: a grammar's masks against brute force, for every kind of tokenizer and of grammar."""

import json
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import StructuredOutputs
from jaxserve.text.grammar import MAX_CACHED, Filler, Grammar, GrammarCompiler, Matcher, Vocabulary
from jaxserve.text.sentencepiece_model import read_sentencepiece_model
from jaxserve.text.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
KINDS = ("bpe", "unigram", "bytes")
CHOICES = (
    "yes",
    "yesterday",
    "no",
    "né",
    'a "quoted" \\ word',
    "日本",
    "\U0001f600!",
    "two words",
    " before",
    "\n\x7f{2}|[^",
)


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "bytes":
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {"<eos>": 0, "<end>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
        vocab |= {"ye": 300, "yes": 301, "Ġw": 302, "no": 303}  # ids between them have no text
        backend = Backend(models.BPE(vocab=vocab, merges=[("y", "e"), ("ye", "s"), ("Ġ", "w"), ("n", "o")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<eos>", "<end>"])
        return Tokenizer.from_backend(backend, eos_token_ids=(0, 1))
    model = read_sentencepiece_model(DATA / f"spm_{kind}.model")
    return Tokenizer.from_backend(model.backend, eos_token_ids=(2,), bos_token_id=1)


@cache
def compiler(kind: str, spare: int = 3) -> GrammarCompiler:
    return GrammarCompiler(tokenizer(kind), tokenizer(kind).vocab_size + spare, tokenizer(kind).eos_token_ids)


def grammar(kind: str, **asked) -> Grammar:
    return compiler(kind).compile(StructuredOutputs(**asked))


def following(matcher: Matcher, words: int) -> set[int]:
    allowed = np.full(words, 77, np.int32)
    matcher.fill(allowed)
    return set(np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")).tolist())


def walk(kind: str, found: Grammar, seed: int, at_most: int = 60, may_fail: bool = False) -> tuple[bytes, Matcher]:
    """A random text of the grammar, byte by byte as the masks let it."""
    rng, matcher, data = random.Random(seed), found.matcher(), b""
    for _ in range(at_most):
        ids = following(matcher, found.num_words) - set(found.end_ids)
        if not ids or (matcher.is_accepting and rng.random() < 0.3):
            break
        token = rng.choice(sorted(ids))
        if not matcher.consume(token):
            assert may_fail and matcher.error
            break
        data += tokenizer(kind).token_bytes(token)
    return data, matcher


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_all_that_can_be_said_and_each_can(kind):
    """At each place the tokens are exactly those that some choice goes on with; where only one way is left, the
    library may hold to the tokenizer's own cut of what must follow."""
    found, words = grammar(kind, choice=CHOICES), [c.encode() for c in CHOICES]
    texts = {i: tokenizer(kind).token_bytes(i) for i in range(tokenizer(kind).vocab_size)}
    said: set[str] = set()
    for seed in range(60):
        rng, matcher, data = random.Random(seed), found.matcher(), b""
        while not matcher.is_complete:
            rest = [w[len(data) :] for w in words if w.startswith(data)]
            right = {i for i, t in texts.items() if t and not tokenizer(kind).is_special(i)
                     and any(r.startswith(t) for r in rest)}  # fmt: skip
            ids = following(matcher, found.num_words)
            assert matcher.is_accepting == (data in words)
            assert (set(found.end_ids) <= ids) == (data in words)
            ids -= set(found.end_ids)
            assert ids == right or (len({r[:1] for r in rest}) == 1 and ids and ids < right), (data, ids, right)
            if matcher.is_accepting and rng.random() < 0.5:
                break
            token = rng.choice(sorted(ids))
            assert matcher.consume(token)
            data += texts[token]
        said.add(data.decode())
    assert said <= set(CHOICES) and len(said) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_json_parses_and_fits_its_schema(kind):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "é", None]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    found, num_complete = grammar(kind, json=schema), 0
    for seed in range(25):
        data, matcher = walk(kind, found, seed, at_most=400)
        if not matcher.is_accepting:
            continue
        value = json.loads(data)
        num_complete += 1
        assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 6
        assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
        assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "é", None}
    assert num_complete >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_regex_and_lark(kind):
    for seed in range(10):
        data, matcher = walk(kind, grammar(kind, regex="[ab]{2,4}(c|dé)"), seed)
        assert matcher.is_complete and data.decode().rstrip("cdé").strip("ab") == "" and 3 <= len(data.decode()) <= 6
        data, matcher = walk(kind, grammar(kind, grammar='start: "(" start ")" | "x"'), seed, at_most=200)
        text = data.decode()
        inside = text.strip("()")
        assert not matcher.is_accepting or text == "(" * text.count("(") + inside + ")" * text.count("(")
        assert not matcher.is_accepting or inside == "x"


def test_spaces_of_json_have_an_end():
    found = grammar("bytes", json={"type": "array", "items": {"type": "integer"}})
    matcher, (bracket, space) = found.matcher(), tokenizer("bytes").encode("[ ")
    assert matcher.consume(bracket)
    taken = 0
    while space in following(matcher, found.num_words):
        assert matcher.consume(space)
        taken += 1
    assert taken == 64 and following(matcher, found.num_words)


def test_tokens_of_what_must_follow_have_its_bytes():
    for kind in KINDS:
        words = Vocabulary(tokenizer(kind), tokenizer(kind).vocab_size, tokenizer(kind).eos_token_ids)
        for text in ("yes two words", "{", ' "name": ', "a", " a", "  x", "日本 né", "\n", ""):
            ids = words(text)
            assert b"".join(words.tokens[i] for i in ids) == text.encode(), (kind, text, ids)
            assert not set(ids) & set(words.special_token_ids)


def test_many_rows_at_once_are_as_one_by_one():
    found = [grammar("bytes", regex="[a-f]+x"), grammar("bytes", json_object=True), grammar("bytes", choice=("no",))]
    matchers = [g.matcher() for g in found for _ in range(3)]
    for i, matcher in enumerate(matchers[:3]):
        for _ in range(i):
            assert matcher.consume(tokenizer("bytes").encode("a")[0])
    allowed = np.full((20, found[0].num_words), -1, np.int32)
    Filler().fill([(m, 2 * i) for i, m in enumerate(matchers)], allowed)
    for i, matcher in enumerate(matchers):
        one = np.zeros(found[0].num_words, np.int32)
        Filler().fill([(matcher, 0)], one[None])
        np.testing.assert_array_equal(allowed[2 * i], one)
    assert (allowed[1::2] == -1).all()


def test_matchers_of_one_grammar_go_their_own_ways():
    found = grammar("bytes", regex="a|bc")
    one, two = found.matcher(), found.matcher()
    a, b = tokenizer("bytes").encode("ab")
    assert one.consume(a) and one.is_complete and not two.is_accepting
    assert two.consume(b) and not two.is_complete and two.error is None
    assert not two.consume(a) and two.error and "\n" not in two.error


def test_equal_requests_are_compiled_once():
    made = compiler("bytes")
    first = made.compile(StructuredOutputs(json={"type": "integer"}))
    assert made.compile(StructuredOutputs(json='{"type": "integer"}')) is first
    for i in range(MAX_CACHED):
        made.compile(StructuredOutputs(regex=f"x{i}"))
    assert made.compile(StructuredOutputs(json={"type": "integer"})) is not first


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"regex": "a("}, "regex: .*regex"),
        ({"json": '{"type": '}, "json: "),
        ({"json": {"type": "objec"}}, "json: Invalid type: objec"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'json: Unimplemented keys: ."uniqueItems"'),
        ({"json": False}, "json: "),
        ({"json": [1]}, "json: "),
        ({"grammar": "start: missing"}, "grammar: .*missing"),
        ({"grammar": "rule: /a/"}, "grammar: "),
        ({"choice": ["x" * 300_000]}, "choice of 300004 bytes, at most 262144"),
        ({"regex": "(?=a)b"}, "regex: "),
    ],
)
def test_refused_by_name(asked, match):
    with pytest.raises(RequestError, match=f"^structured_outputs: {match}") as caught:
        compiler("bytes").compile(StructuredOutputs(**asked))
    assert "\n" not in str(caught.value)


HOSTILE = {
    "nested repeats": {"regex": "((a{1000}){1000}){1000}"},
    "optional repeats": {"regex": "(a?){5000}a{5000}"},
    "long lookback": {"regex": "(a|b)*a(a|b){200}"},
    "deep schema": {"json": '{"type":"array","items":' * 3000 + "{}" + "}" * 3000},
    "many properties": {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(3000)}}},
    "ambiguous": {"grammar": 'start: e\ne: e e | "a" | "b" | e "a" e | \n'},
    "endless rule": {"grammar": 'start: start "a"'},
    "self reference": {"json": {"$ref": "#"}},
    "huge counts": {"json": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}},
    "many choices": {"choice": [f"value {i} {i * 7919 % 1000003}" for i in range(9000)]},
    "unions": {
        "json": {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(800)]}
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_takes_little_time(name):
    """Refused, or each step within its fuel; the limits are some ten times what this takes on a quiet machine."""
    start = time.process_time()
    try:
        found = compiler("bpe").compile(StructuredOutputs(**HOSTILE[name]))
    except RequestError as error:
        assert error.field == "structured_outputs" and len(str(error)) < 400
    else:
        walk("bpe", found, seed=1, at_most=30, may_fail=True)
    assert time.process_time() - start < 6


def test_random_garbage_is_refused_or_compiled():
    rng = random.Random(5)
    for i in range(150):
        pieces = [
            "a",
            "(",
            ")",
            "[",
            "]",
            "*",
            "+",
            "{3}",
            "|",
            "\\",
            "^",
            "$",
            ".",
            '"',
            ":",
            "start",
            "\n",
            "\0",
            "é",
        ]
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        for asked in ({"regex": text}, {"grammar": f"start: {text}"}, {"json": text}):
            try:
                grammar("bytes", **asked)
            except RequestError as error:
                assert error.field == "structured_outputs", (i, asked)


def test_a_model_without_end_cannot_be_held_to_a_grammar():
    without = GrammarCompiler(tokenizer("bytes"), 304, ())
    with pytest.raises(RequestError, match="structured_outputs: the model has no end-of-sequence"):
        without.compile(StructuredOutputs(regex="a"))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({}, "has nothing, give exactly one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice, give exactly one"),
        ({"choice": "yes"}, "choice='yes' is not a sequence"),
        ({"choice": []}, r"choice=\(\) is not a sequence of one text or more"),
        ({"choice": ["a", 3]}, "choice has 3, which is not a text"),
        ({"choice": ["a", None]}, "choice has None, which is not a text"),
        ({"regex": 3}, "regex has 3, which is not a text"),
        ({"regex": "\ud800"}, "regex: not valid Unicode at character 0"),
        ({"json": {"a": {1, 2}}}, "json is not a JSON schema"),
        ({"json_object": "yes"}, "json_object='yes' is not true or false"),
    ],
)
def test_what_is_no_structured_output(asked, match):
    with pytest.raises(RequestError, match=f"^structured_outputs: {match}"):
        StructuredOutputs(**asked)
