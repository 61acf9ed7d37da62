"""A tokenizer from GGUF metadata: byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``) or SentencePiece (``llama``)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.text.decoding import TokenizerError
from jaxserve.text.gguf_pre import PRE_TOKENIZERS, PreTokenizer
from jaxserve.text.sentencepiece import Normalization, PieceType, sentencepiece_backend
from jaxserve.text.tokenizer import Tokenizer, without_panic

_PREFIX = "tokenizer.ggml."
_READ_KEYS = {"model", "pre", "tokens", "token_type", "bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token"}
_READ_KEYS_BY_MODEL = {
    "gpt2": _READ_KEYS | {"merges"},
    "llama": _READ_KEYS | {"scores", "add_space_prefix", "merges"},  # its merges follow from the scores
}
_NEUTRAL_KEYS: dict[str, Any] = {
    "add_eos_token": False,
    "add_sep_token": False,
    "add_space_prefix": False,
    "remove_extra_whitespaces": False,
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises:
        TokenizerError: naming the key or token that is missing, malformed or not supported.
    """
    model = _get(metadata, "model", str)
    if model not in _READ_KEYS_BY_MODEL:
        raise TokenizerError(
            f"tokenizer.ggml.model {model!r} is not supported, only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        )
    _refuse_unknown_keys(metadata, _READ_KEYS_BY_MODEL[model])
    tokens = _get_list(metadata, "tokens", str)
    token_types = _get_list(metadata, "token_type", int)
    if len(token_types) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type has {len(token_types)} entries, tokens has {len(tokens)}")
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        backend = _byte_level(tokens, token_types, _get_list(metadata, "merges", str), pre)
        adds_bos = pre.add_bos
    else:
        backend = _sentencepiece(metadata, tokens, token_types)
        adds_bos = True
    eos_token_id = _get(metadata, "eos_token_id", int)
    eot_token_id = _get(metadata, "eot_token_id", int, eos_token_id)
    bos_token_id = _get(metadata, "bos_token_id", int, None)
    adds_bos = _get(metadata, "add_bos_token", bool, adds_bos)
    if adds_bos and bos_token_id is None:
        raise TokenizerError("tokenizer.ggml.add_bos_token is set but there is no bos_token_id")
    pad_token_id = _get(metadata, "padding_token_id", int, None)
    return Tokenizer.from_backend(
        backend,
        eos_token_ids=tuple(dict.fromkeys((eos_token_id, eot_token_id))),
        bos_token_id=bos_token_id,
        pad_token_id=pad_token_id,
        prefix_ids=(bos_token_id,) if adds_bos and bos_token_id is not None else (),
        chat_template=_chat_templates(metadata),
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Sources by name; the one without a name is the default."""
    key = "tokenizer.chat_template"
    found = {"default": metadata[key]} if key in metadata else {}
    found |= {k[len(key) + 1 :]: v for k, v in metadata.items() if k.startswith(key + ".")}
    for name, source in found.items():
        if not isinstance(source, str):
            raise TokenizerError(f"{key} ({name}) must be a string, not {type(source).__name__}")
    return found


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _get(metadata, "pre", str)
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre {name!r} is not supported, only {', '.join(map(repr, PRE_TOKENIZERS))} are"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(
    tokens: list[str], token_types: list[int], merges: list[str], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    vocab: dict[str, int] = {}
    added: list[AddedToken] = []
    for i, (token, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if not token:
            raise TokenizerError(f"tokenizer.ggml.tokens[{i}] is empty")
        if vocab.setdefault(token, i) != i:
            raise TokenizerError(f"tokenizer.ggml.tokens[{i}] {token!r} is also token {vocab[token]}")
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED):
            added.append(AddedToken(token, special=kind != PieceType.USER_DEFINED, normalized=False))
        elif kind not in (PieceType.NORMAL, PieceType.UNUSED):
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
    model = without_panic(lambda: models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    backend = tokenizers.Tokenizer(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in pre.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], token_types: list[int]) -> tokenizers.Tokenizer:
    scores = _get_list(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores has {len(scores)} entries, tokens has {len(tokens)}")
    normalization = Normalization(adds_space=_get(metadata, "add_space_prefix", bool, True))
    try:
        return sentencepiece_backend(tokens, scores, token_types, normalization, is_bpe=True)
    except TokenizerError as e:
        raise TokenizerError(f"tokenizer.ggml.tokens: {e}") from e


def _refuse_unknown_keys(metadata: Mapping[str, Any], read_keys: set[str]) -> None:
    """A key we do not know may change how text is split: better no tokens than wrong ones."""
    for key, value in metadata.items():
        name = key.removeprefix(_PREFIX)
        if name == key or name in read_keys or name.endswith("_token_id"):
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
