"""SentencePiece vocabularies: ids and text as the `sentencepiece` package recorded them, from both kinds of file."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.decoding import TokenizerError
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.hf_tokenizer import tokenizer_from_folder
from jaxserve.text.sentencepiece import MAX_PIECE_LEN
from jaxserve.text.sentencepiece_model import _message_class, read_sentencepiece_model
from jaxserve.text.tokenizer import Tokenizer
from tests.text.metadata import TEXTS

DATA = Path(__file__).resolve().parents[1] / "data"
EXPECTED = json.loads((DATA / "spm_expected.json").read_text(encoding="utf-8"))
ROWS = [(kind, *row) for kind, rows in EXPECTED.items() for row in rows]


@cache
def proto(kind: str):
    return _message_class().FromString((DATA / f"spm_{kind}.model").read_bytes())


@cache
def tokenizer(kind: str) -> Tokenizer:
    model = read_sentencepiece_model(DATA / f"spm_{kind}.model")
    assert (model.unk_token_id, model.bos_token_id, model.eos_token_id, model.pad_token_id) == (0, 1, 2, None)
    return Tokenizer.from_backend(model.backend, eos_token_ids=(2,), bos_token_id=1)


@cache
def gguf(**changes) -> Tokenizer:
    pieces = proto("bpe").pieces
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [p.piece for p in pieces],
        "scores": [p.score for p in pieces],
        "token_type": [p.type for p in pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values |= changes
    return tokenizer_from_gguf({f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None})


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return "".join([*map(detokenizer.add, ids), detokenizer.flush()])


@pytest.mark.parametrize(("kind", "text", "ids", "decoded"), ROWS, ids=[f"{r[0]}-{i}" for i, r in enumerate(ROWS)])
def test_ids_and_text_are_the_package_s_own(kind, text, ids, decoded):
    ours = tokenizer(kind)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == decoded == stream(ours, ids)
    assert ours.min_num_tokens(text) <= len(ids)
    if kind == "bpe":
        assert gguf().encode(text) == [1, *ids]
        assert gguf().decode(ids) == decoded


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None)
@given(text=TEXTS)
def test_every_text_survives_but_for_the_space_character_itself(kind, text):
    ours = tokenizer(kind)
    text = text.replace("<user>", "")  # what follows one begins with a space, as a text does
    ids = ours.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text.replace("\u2581", " ")
    assert ours.min_num_tokens(text) <= len(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans(), continues=st.booleans())
def test_stream_equals_decode_at_the_start_and_after_text(kind, data, skip, continues):
    ours = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 2), max_size=20))
    options = {"skip_special_tokens": skip, "continues_text": continues}
    assert stream(ours, ids, **options) == ours.decode(ids, **options)


def test_a_completion_keeps_the_space_that_parts_it_from_its_prompt():
    ours = tokenizer("bpe")
    ids = ours.encode("the the")
    assert [ours.token_bytes(i) for i in ids] == [b" the", b" the"]
    assert ours.decode(ids[:1]) + ours.decode(ids[1:], continues_text=True) == ours.decode(ids) == "the the"
    assert stream(ours, ids[1:], continues_text=True) == " the"
    assert stream(ours, ids[1:]) == "the"
    assert stream(ours, [1, *ids]) == "the the"  # a skipped token is no text
    assert ours.decode([1, *ids], skip_special_tokens=False) == "<s> the the"


def test_only_one_space_is_stripped_and_only_where_encoding_adds_one():
    assert tokenizer("bpe").decode(tokenizer("bpe").encode("  x")) == "  x"
    plain = gguf(add_space_prefix=False)
    assert not plain.strips_first_space
    assert plain.encode("the") != gguf().encode("the")
    assert plain.decode(plain.encode(" the")) == " the"


def test_byte_tokens_are_bytes():
    ours = tokenizer("bpe")
    ids = ours.encode("€")
    assert [ours.token_bytes(i) for i in ids] == [b" ", b"\xe2", b"\x82", b"\xac"]
    assert stream(ours, ids) == "€"
    assert ours.decode(ids[:3]) == "\ufffd"


def test_user_defined_pieces_are_text_and_found_whole():
    for ours in (tokenizer("bpe"), tokenizer("unigram"), gguf()):
        (user,) = (i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"<user>")
        assert user in ours.encode("a<user>b")
        assert not ours.is_special(user)
    pieces = [p.piece for p in proto("bpe").pieces]
    pieces[-1] = "      "  # a run of spaces, as Gemma has them
    types = [p.type for p in proto("bpe").pieces]
    types[-1] = 4
    spaced = gguf.__wrapped__(tokens=pieces, token_type=types, add_space_prefix=False)
    assert spaced.encode("the      fox")[1:].count(len(pieces) - 1) == 1
    assert spaced.decode(spaced.encode("the      fox")) == "the      fox"


def test_add_bos_is_the_default_of_sentencepiece_files(tmp_path):
    assert gguf().prefix_ids == (1,)
    assert gguf(add_bos_token=False).prefix_ids == ()
    (tmp_path / "tokenizer.model").write_bytes((DATA / "spm_bpe.model").read_bytes())
    assert tokenizer_from_folder(tmp_path, ()).prefix_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [1.0]}, "scores has 1 entries, tokens has"),
        ({"tokens": ["a"] * 3, "scores": [0.0] * 3, "token_type": [1] * 3}, "piece 1 'a' is also piece 0"),
        ({"tokens": ["a", "", "b"], "scores": [0.0] * 3, "token_type": [1] * 3}, "piece 1 is empty"),
        ({"tokens": ["a", "b", "c"], "scores": [0.0] * 3, "token_type": [1, 9, 1]}, "piece 1 'b' has type 9"),
        (
            {"tokens": ["a", "b", "c" * 999], "scores": [0.0] * 3, "token_type": [1] * 3},
            f"999 characters, at most {MAX_PIECE_LEN}",
        ),
        ({"remove_extra_whitespaces": True}, "'tokenizer.ggml.remove_extra_whitespaces'=True is not supported"),
        ({"precompiled_charsmap": [1]}, "'tokenizer.ggml.precompiled_charsmap' is not supported"),
        ({"add_space_prefix": 1}, "add_space_prefix must be bool, not int"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_served_are_refused_by_name(changes, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        gguf.__wrapped__(**changes)


def changed_model(**fields) -> bytes:
    message = _message_class()()
    message.CopyFrom(proto("bpe"))
    for name, value in fields.items():
        part, _, field = name.partition("__")
        setattr(getattr(message, part), field, value)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "it has no pieces"),
        (b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),  # a tiktoken file of the same name
        (changed_model(trainer_spec__model_type=4), "model_type=4"),
        (changed_model(trainer_spec__treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix=true"),
        (changed_model(normalizer_spec__escape_whitespaces=False), "escape_whitespaces=false"),
        (changed_model(normalizer_spec__precompiled_charsmap=b"\xff\xff\xff\x7fabc"), "tokenizer library"),
    ],
)
def test_model_files_that_cannot_be_served_are_refused_by_name(tmp_path, data, complaint):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    with pytest.raises(TokenizerError, match=complaint) as error:
        read_sentencepiece_model(file)
    assert str(file) in str(error.value)


def test_spaces_are_joined_where_the_model_says_so(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(changed_model(normalizer_spec__remove_extra_whitespaces=True))
    ours = Tokenizer.from_backend(read_sentencepiece_model(file).backend, eos_token_ids=(2,))
    assert ours.encode("  the   fox ") == tokenizer("bpe").encode("the fox")
    assert ours.encode("   ") == []
