"""A tokenizer from GGUF metadata: byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``)."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.text.tokenizer import Tokenizer, TokenizerError


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # special: matched in text, skipped when decoding
    USER_DEFINED = 4  # matched in text, decoded like text
    UNUSED = 5  # has an id, never produced by encoding
    BYTE = 6


class PreTokenizer(NamedTuple):
    """How ``tokenizer.ggml.pre`` splits text before BPE.

    Args:
        splits: regular expressions applied one after another, every match a piece of its own.
        nfc: text is normalised to Unicode NFC first.
        ignore_merges: a piece that is a token is that token, whatever its merges say.
        add_bos: the default where the file does not say ``tokenizer.ggml.add_bos_token``.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_DIGIT = r"\p{N}"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((_DIGIT, _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
}

_PREFIX = "tokenizer.ggml."
_READ_KEYS = {
    "model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token",
}  # fmt: skip
_NEUTRAL_KEYS: dict[str, Any] = {"add_eos_token": False, "add_sep_token": False, "add_space_prefix": False}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises:
        TokenizerError: naming the key or token that is missing, malformed or not supported.
    """
    model = _get(metadata, "model", str)
    if model != "gpt2":
        raise TokenizerError(f"tokenizer.ggml.model {model!r} is not supported, only 'gpt2' (byte-level BPE) is")
    pre_name = _get(metadata, "pre", str)
    if pre_name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre {pre_name!r} is not supported, only {', '.join(map(repr, PRE_TOKENIZERS))} are"
        )
    _refuse_unknown_keys(metadata)
    pre = PRE_TOKENIZERS[pre_name]
    tokens = _get_list(metadata, "tokens", str)
    token_types = _get_list(metadata, "token_type", int)
    if len(token_types) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(token_types)} entries, tokens has {len(tokens)}")
    eos_token_id = _get(metadata, "eos_token_id", int)
    eot_token_id = _get(metadata, "eot_token_id", int, eos_token_id)
    chat_template = metadata.get("tokenizer.chat_template")
    if chat_template is not None and not isinstance(chat_template, str):
        raise TokenizerError(f"tokenizer.chat_template must be a string, not {type(chat_template).__name__}")
    return Tokenizer.from_backend(
        _backend(tokens, token_types, _get_list(metadata, "merges", str), pre),
        eos_token_ids=tuple(dict.fromkeys((eos_token_id, eot_token_id))),
        bos_token_id=_get(metadata, "bos_token_id", int, None),
        add_bos=_get(metadata, "add_bos_token", bool, pre.add_bos),
        chat_template=chat_template,
    )


def _backend(tokens: list[str], token_types: list[int], merges: list[str], pre: PreTokenizer) -> tokenizers.Tokenizer:
    vocab: dict[str, int] = {}
    added: list[AddedToken] = []
    for i, (token, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if not token:
            raise TokenizerError(f"tokenizer.ggml.tokens[{i}] is empty")
        if vocab.setdefault(token, i) != i:
            raise TokenizerError(f"tokenizer.ggml.tokens[{i}] {token!r} is also token {vocab[token]}")
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False))
        elif kind not in (TokenType.NORMAL, TokenType.UNUSED):
            raise TokenizerError(f"tokenizer.ggml.token_type[{i}]={kind} is not supported by model 'gpt2'")
    pairs: list[tuple[str, str]] = []
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(f"tokenizer.ggml.merges[{i}] {merge!r} is not two tokens with a space between")
        for token in (left, right, left + right):
            if token not in vocab:
                raise TokenizerError(f"tokenizer.ggml.merges[{i}] {merge!r}: {token!r} is not a token")
        pairs.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in pre.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def _refuse_unknown_keys(metadata: Mapping[str, Any]) -> None:
    """A key we do not know may change how text is split: better no tokens than wrong ones."""
    for key, value in metadata.items():
        name = key.removeprefix(_PREFIX)
        if name == key or name in _READ_KEYS or name.endswith("_token_id"):
            continue
        if name not in _NEUTRAL_KEYS or value != _NEUTRAL_KEYS[name]:
            shown = f"={value!r}" if isinstance(value, (bool, int, float, str)) else ""
            raise TokenizerError(f"{key!r}{shown:.60} is not supported")


_REQUIRED = object()


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(_PREFIX + name)
    if value is None:
        if default is _REQUIRED:
            raise TokenizerError(f"{_PREFIX}{name} is missing")
        return default
    if type(value) is not kind:
        raise TokenizerError(f"{_PREFIX}{name} must be {kind.__name__}, not {type(value).__name__}")
    return value


def _get_list(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    value = metadata.get(_PREFIX + name)
    if value is None:
        raise TokenizerError(f"{_PREFIX}{name} is missing")
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or (value and type(value[0]) is not kind):  # GGUF arrays have one element type
        raise TokenizerError(f"{_PREFIX}{name} must be an array of {kind.__name__}")
    return value
