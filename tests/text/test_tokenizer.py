"""Tokenizers from GGUF metadata: splits by pre-tokenizer, ids of added tokens, refusals by name."""

import unicodedata
from functools import cache

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.decoding import BYTE_OF_CHAR, TokenizerError
from jaxserve.text.gguf_pre import PRE_TOKENIZERS
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer
from tests.text.metadata import BOS, EOS, MERGES, SPACED, TEXTS, USER, gguf_metadata


@cache
def tiny(pre: str) -> Tokenizer:
    return tokenizer_from_gguf(gguf_metadata(pre))


def pieces(pre: str, text: str) -> list[str]:
    """What ``text`` is split into before BPE, in plain characters."""
    split = tiny(pre)._backend.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(BYTE_OF_CHAR[c] for c in piece).decode() for piece, _ in split]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "Hello  world's 1234!\n\nx", ["Hello", " ", " world", "'s", " 1234", "!", "\n", "\n", "x"]),
        ("gpt-2", "I'LL a_b   ", ["I", "'", "LL", " a", "_", "b", "   "]),
        ("default", "Hello  world's 1234!", ["Hello", " ", " world", "'s", " 1234", "!"]),
        ("smollm", "x12 34½ y", ["x", "1", "2", " ", "3", "4", "½", " y"]),
        ("smollm", "it's 5\tpm", ["it", "'s", " ", "5", "\t", "pm"]),
        ("llama-bpe", "it'S 12345 (a)\r\n\n b", ["it", "'S", " ", "123", "45", " (", "a", ")\r\n\n", " b"]),
        ("llama-bpe", "!word  x", ["!word", " ", " x"]),
        ("qwen2", "it'S 123 (a)\n b", ["it", "'S", " ", "1", "2", "3", " (", "a", ")\n", " b"]),
        ("qwen35", "q\u0323x\n1", ["q\u0323x", "\n", "1"]),
        ("gpt-4o", "myHTTPServer's 1234/\n", ["my", "HTTPServer's", " ", "123", "4", "/\n"]),
        ("tekken", "myHTTPServer's 12", ["my", "HTTPServer", "'s", " ", "1", "2"]),
        ("deepseek-v3", "1234 日本x (a)\n", ["123", "4", " ", "日本", "x", " (", "a", ")\n"]),
        ("deepseek-coder", "a b\n12日", ["a", " b", "\n", "1", "2", "日"]),
        ("glm4", "it'S 12345", ["it", "'S", " ", "123", "45"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(pre, text, expected):
    assert pieces(pre, text) == expected


@settings(deadline=None)  # building a tokenizer takes a while on a busy machine
@given(text=TEXTS)
def test_gpt2_split_is_the_library_s_own(text):
    library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    ours = tiny("gpt-2")._backend.pre_tokenizer
    assert ours.pre_tokenize_str(text) == library.pre_tokenize_str(text)


@settings(deadline=None)
@given(text=TEXTS)
def test_smollm_split_is_digits_then_gpt2(text):
    library = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = tiny("smollm")._backend.pre_tokenizer
    assert ours.pre_tokenize_str(text) == library.pre_tokenize_str(text)


@settings(deadline=None, max_examples=40)
@given(text=TEXTS)
def test_qwen2_normalises_to_nfc_and_the_others_do_not(text):
    for pre in PRE_TOKENIZERS:
        tokenizer = tiny(pre)
        expected = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].nfc else text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == expected
        assert tokenizer.min_num_tokens(text) <= len(tokenizer.encode(text))


def test_merges_apply_in_order_and_llama_bpe_may_ignore_them():
    tokens = gguf_metadata()["tokenizer.ggml.tokens"]
    without = [m for m in MERGES if m != "ab c"]
    tokens_of = {
        pre: [
            tokens[i]
            for i in tokenizer_from_gguf(gguf_metadata(pre, merges=without, add_bos_token=False)).encode("abc")
        ]
        for pre in ("gpt-2", "llama-bpe")
    }
    assert tokens_of == {"gpt-2": ["ab", "c"], "llama-bpe": ["abc"]}


def test_added_tokens_are_found_in_text_and_unused_ones_are_not():
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    tokens = gguf_metadata()["tokenizer.ggml.tokens"]
    for token in (EOS, BOS, USER, SPACED):
        assert tokenizer.encode(f"a{token}a") == [tokens.index("a"), tokens.index(token), tokens.index("a")]
        assert tokenizer.token_bytes(tokens.index(token)) == token.encode()
    assert tokens.index("[PAD]") not in tokenizer.encode("[PAD]")
    assert [t for t in tokens if tokenizer.is_special(tokens.index(t))] == [EOS, BOS]


def test_bos_is_added_when_asked_and_by_the_pre_tokenizer_s_default():
    bos = gguf_metadata()["tokenizer.ggml.bos_token_id"]
    assert tokenizer_from_gguf(gguf_metadata(add_bos_token=True)).encode("a")[0] == bos
    assert bos not in tokenizer_from_gguf(gguf_metadata(add_bos_token=True)).encode("a", add_special_tokens=False)
    assert bos not in tokenizer_from_gguf(gguf_metadata("gpt-2", add_bos_token=None)).encode("a")
    assert tokenizer_from_gguf(gguf_metadata("llama-bpe", add_bos_token=None)).encode("a")[0] == bos


def test_end_of_turn_ends_a_generation_too():
    tokenizer = tokenizer_from_gguf(gguf_metadata(eot_token_id=3))
    assert tokenizer.eos_token_ids == (gguf_metadata()["tokenizer.ggml.eos_token_id"], 3)


def test_numeric_arrays_may_be_numpy():
    kinds = np.array(gguf_metadata()["tokenizer.ggml.token_type"], np.int32)
    assert tokenizer_from_gguf(gguf_metadata(token_type=kinds)).is_special(
        gguf_metadata()["tokenizer.ggml.eos_token_id"]
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": "viking"}, "tokenizer.ggml.pre 'viking' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens must be an array of str"),
        ({"token_type": [1, 1]}, "token_type has 2 entries, tokens has "),
        ({"token_type": [6] * 266}, r"token_type\[0\]=6 is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, r"merges\[0\] 'ab' is not two tokens"),
        ({"merges": ["a b c"]}, r"merges\[0\] 'a b c' is not two tokens"),
        ({"merges": ["a b", "b a"]}, r"merges\[1\] 'b a': 'ba' is not a token"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"eos_token_id": 999}, "eos_token_ids: 999 is not a token id, the vocabulary has 266"),
        ({"eos_token_id": "2"}, "eos_token_id must be int, not str"),
        ({"bos_token_id": None, "add_bos_token": True}, "no bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token must be bool, not int"),
        ({"add_eos_token": True}, "'tokenizer.ggml.add_eos_token'=True is not supported"),
        ({"add_space_prefix": True}, "'tokenizer.ggml.add_space_prefix'=True is not supported"),
        ({"precompiled_charsmap": [1]}, "'tokenizer.ggml.precompiled_charsmap' is not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        tokenizer_from_gguf(gguf_metadata(**changes))


@pytest.mark.parametrize("token", ["a", ""])
def test_a_repeated_or_empty_token_is_refused(token):
    tokens = [*gguf_metadata()["tokenizer.ggml.tokens"]]
    tokens[7] = token
    with pytest.raises(TokenizerError, match="is also token 7" if token else r"tokens\[7\] is empty"):
        tokenizer_from_gguf(gguf_metadata(tokens=tokens))


def test_lone_surrogates_are_refused_with_their_place():
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    for read in (tokenizer.encode, tokenizer.min_num_tokens):
        with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
            read("ab\ud800c")


def test_negative_ids_are_refused_and_ids_past_the_vocabulary_have_no_text():
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    with pytest.raises(ValueError, match="token_id=-1"):
        tokenizer.token_bytes(-1)
    with pytest.raises(ValueError, match="token_id=-1"):
        tokenizer.decode([-1])


@settings(deadline=None)
@given(text=st.text(max_size=200))
def test_the_lower_bound_of_tokens_holds(text):
    tokenizer = tiny("gpt-2")
    assert tokenizer.min_num_tokens(text * 9) <= len(tokenizer.encode(text * 9))


def backend_of(**vocab: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab or {"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return backend


def test_backends_that_would_change_text_are_refused():
    for decoder in (
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Replace(tokenizers.Regex("a+"), "b"),
    ):
        backend = backend_of()
        backend.decoder = decoder
        with pytest.raises(TokenizerError, match="tokenizer decoder .* is not supported"):
            Tokenizer.from_backend(backend, eos_token_ids=(0,))
    backend.decoder = None
    with pytest.raises(TokenizerError, match="has no decoder"):
        Tokenizer.from_backend(backend, eos_token_ids=(0,))
    truncating = backend_of()
    truncating.enable_truncation(4)
    with pytest.raises(TokenizerError, match="truncates or pads"):
        Tokenizer.from_backend(truncating, eos_token_ids=(0,))


def test_metaspace_decoders_strip_the_space_that_their_encoders_add():
    backend = backend_of(**{"\u2581a": 0, "b": 1, "<0x0A>": 2})
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = Tokenizer.from_backend(backend, eos_token_ids=(1,))
    assert tokenizer.decode([0, 0, 1]) == "a ab" == backend.decode([0, 0, 1])
    assert tokenizer.decode([0, 0, 1], continues_text=True) == " a ab"
    assert tokenizer.decode([2]) == "<0x0A>"  # not a byte: the decoder has no fallback to bytes
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    assert Tokenizer.from_backend(backend, eos_token_ids=(1,)).decode([0, 0]) == " a a"


def test_ids_far_beyond_the_vocabulary_are_refused_before_a_table_is_made():
    with pytest.raises(TokenizerError, match="token id 4000000000 in a vocabulary of 2 tokens"):
        Tokenizer.from_backend(backend_of(a=0, b=4_000_000_000), eos_token_ids=(0,))


def test_named_templates_are_chosen_by_tools():
    options = {"chat_template": {"default": "plain", "tool_use": "{{ tools[0].name }}"}}
    tokenizer = Tokenizer.from_backend(backend_of(), eos_token_ids=(0,), **options)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_template == "plain"
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[{"name": "f"}]) == "f"
    only_rag = Tokenizer.from_backend(backend_of(), eos_token_ids=(0,), chat_template={"rag": "x"})
    with pytest.raises(ChatTemplateError, match="no chat template 'default', only 'rag'"):
        only_rag.render_chat(messages)


def test_gaps_in_the_vocabulary_have_no_text():
    tokenizer = Tokenizer.from_backend(backend_of(a=0, b=5), eos_token_ids=(5,))
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 3, 5]) == "ab"


def test_a_token_that_swallows_spaces_leaves_no_lower_bound():
    backend = backend_of()
    backend.add_tokens([AddedToken("<x>", rstrip=True)])
    tokenizer = Tokenizer.from_backend(backend, eos_token_ids=(0,))
    assert tokenizer.min_num_tokens("<x>" + " " * 1000) <= len(tokenizer.encode("<x>" + " " * 1000))
