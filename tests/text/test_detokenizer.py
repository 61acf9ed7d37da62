"""Streaming equals decoding at once, for every sequence of ids and every text."""

from functools import cache

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxserve.checkpoint import DEFAULT_MODEL, GGUFCheckpoint, resolve_model
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer
from tests.text.metadata import EOS, TEXTS, USER, gguf_metadata


@cache
def tiny() -> Tokenizer:
    return tokenizer_from_gguf(gguf_metadata())


@cache
def real() -> Tokenizer:
    with GGUFCheckpoint(resolve_model(DEFAULT_MODEL)) as checkpoint:
        return checkpoint.tokenizer()


TOKENIZERS = {"tiny": tiny, "real": real}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizer._backend


def has_token_for_every_byte(tokenizer: Tokenizer, text: str) -> bool:
    """The real vocabulary lacks some bytes that its training text lacked."""
    tokens = {tokenizer.token_bytes(i) for i in range(300)}
    return all(bytes([b]) in tokens for b in text.encode())


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    """What each token emits, then what the flush does."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@each_tokenizer
@settings(deadline=None)  # the first example builds the tokenizer
@given(data=st.data(), skip=st.booleans())
def test_stream_of_random_ids_equals_decode(name, data, skip):
    tokenizer = TOKENIZERS[name]()
    any_id = st.integers(0, tokenizer.vocab_size + 2)  # the last ones have no text
    low_id = st.integers(0, 300)  # single bytes and special tokens
    ids = data.draw(st.lists(st.one_of(any_id, low_id), max_size=30))
    pieces = stream(tokenizer, ids, skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) == whole
    assert whole == backend(tokenizer).decode(ids, skip_special_tokens=skip)


@each_tokenizer
@settings(deadline=None)  # the first example builds the tokenizer
@given(text=TEXTS)
def test_every_text_survives_encoding_and_streaming(name, text):
    tokenizer = TOKENIZERS[name]()
    assume(has_token_for_every_byte(tokenizer, text))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "".join(stream(tokenizer, ids, False)) == text
    assert len(ids) >= tokenizer.min_num_tokens(text)


@each_tokenizer
@settings(deadline=None)  # the first example builds the tokenizer
@given(text=TEXTS)
def test_what_was_emitted_is_never_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]()
    assume(has_token_for_every_byte(tokenizer, text))
    emitted = ""
    for piece in stream(tokenizer, tokenizer.encode(text), False):
        emitted += piece
        assert text.startswith(emitted)


def test_bytes_that_the_vocabulary_lacks_are_dropped_as_the_models_own_tokenizer_drops_them():
    tokenizer = real()
    assert not has_token_for_every_byte(tokenizer, "\x04")
    assert tokenizer.encode("a\x04b") == tokenizer.encode("a") + tokenizer.encode("b")


def test_a_character_split_over_tokens_waits_for_its_last_byte():
    tokenizer = tiny()
    ids = tokenizer.encode("🙂é", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b"\xf0", b"\x9f", b"\x99", b"\x82", b"\xc3\xa9"]
    assert stream(tokenizer, ids, True) == ["", "", "", "🙂", "é", ""]


def test_an_ill_formed_character_is_replaced_as_soon_as_it_is_known():
    tokenizer = tiny()
    euro = tokenizer.encode("€")  # three bytes
    letter = tokenizer.encode("x")
    assert stream(tokenizer, euro[:2] + letter, True) == ["", "", "\ufffdx", ""]
    assert stream(tokenizer, euro[:2], True) == ["", "", "\ufffd"]


def test_a_skipped_special_token_does_not_break_a_character():
    tokenizer = tiny()
    euro, special = tokenizer.encode("€"), tokenizer.eos_token_ids[0]
    ids = [euro[0], special, *euro[1:]]
    assert "".join(stream(tokenizer, ids, True)) == "€"
    assert (
        "".join(stream(tokenizer, ids, False))
        == f"\ufffd{EOS}\ufffd\ufffd"
        == backend(tokenizer).decode(ids, skip_special_tokens=False)
    )


def test_user_defined_tokens_are_text_and_control_tokens_are_not():
    tokenizer = tiny()
    ids = tokenizer.encode(f"a{USER}b{EOS}")
    assert tokenizer.decode(ids) == f"a{USER}b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{USER}b{EOS}"
