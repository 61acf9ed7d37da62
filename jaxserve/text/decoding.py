"""How a tokenizer's decoder turns tokens into bytes, read from the `tokenizers` decoder it was published with.

Real models have two kinds. Byte level (GPT-2, Llama 3, Qwen, DeepSeek, GPT-OSS): every character of a token stands for
one byte. SentencePiece (Llama 2, Mistral, Gemma, Phi-3): ``▁`` stands for a space, ``<0xNN>`` for one byte, and a text
may begin with a space that no author wrote, which decoding takes away.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers


class TokenizerError(ValueError):
    """Text that cannot be encoded, or a tokenizer that this package cannot serve."""


MAX_UNUSED_IDS = 2**20  # ids without a token: a hostile file must not make a table of billions

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, inverted: printable Latin-1 is itself, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for i, b in enumerate(b for b in range(256) if b not in printable):
        table[chr(0x100 + i)] = b
    return table


BYTE_OF_CHAR = _byte_of_char()


class Decoding(NamedTuple):
    """What a decoder does, token by token.

    Args:
        byte_level: characters are bytes in GPT-2's alphabet.
        replacements: texts replaced inside every token, in this order.
        byte_fallback: tokens ``<0xNN>`` are raw bytes.
        strips_first_space: a space at position 0 of a text was put there by encoding, and is not part of it.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strips_first_space: bool = False

    def token_bytes(self, token: str, *, is_added: bool) -> bytes:
        """The bytes of one token of the vocabulary. An added token of a byte-level vocabulary is its own text."""
        if self.byte_level:
            if is_added:
                return token.encode()
            try:
                return bytes([BYTE_OF_CHAR[c] for c in token])
            except KeyError:  # not written in the byte alphabet: the token is its own text
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def read_decoding(backend: tokenizers.Tokenizer) -> Decoding:
    """The decoding of a `tokenizers` object.

    Raises:
        TokenizerError: its decoder is none, or does something that is not a function of each token alone.
    """
    if backend.decoder is None:
        raise TokenizerError("the tokenizer has no decoder: its tokens cannot be turned into text")
    steps = _flat(state_of(backend.decoder), "decoders")
    decoding, is_fused = Decoding(), False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not is_fused and decoding == Decoding():
            decoding = decoding._replace(byte_level=True)
        elif kind == "Replace" and not is_fused and not decoding.byte_level and "String" in step["pattern"]:
            pair = (step["pattern"]["String"], step["content"])
            decoding = decoding._replace(replacements=(*decoding.replacements, pair))
        elif kind == "ByteFallback" and not is_fused and not decoding.byte_level:
            decoding = decoding._replace(byte_fallback=True)
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Metaspace" and not is_fused and not decoding.byte_level:
            decoding = decoding._replace(
                replacements=(*decoding.replacements, (step["replacement"], " ")),
                strips_first_space=step["prepend_scheme"] != "never",
            )
        elif kind == "Strip" and is_fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            decoding = decoding._replace(strips_first_space=True)
        else:
            raise TokenizerError(f"tokenizer decoder {json.dumps(step, ensure_ascii=False):.200} is not supported here")
    return decoding


def token_table(backend: tokenizers.Tokenizer, decoding: Decoding) -> tuple[list[bytes], frozenset[int]]:
    """Bytes of every token id, and the ids of special tokens.

    Raises:
        TokenizerError: ids are so sparse that the file must be wrong.
    """
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    max_id = max(vocab.values(), default=-1)
    if max_id >= 2 * len(vocab) + MAX_UNUSED_IDS:
        raise TokenizerError(f"token id {max_id} in a vocabulary of {len(vocab)} tokens")
    table = [b""] * (max_id + 1)
    for token, i in vocab.items():
        table[i] = decoding.token_bytes(token, is_added=False)
    for i, token in added.items():
        table[i] = decoding.token_bytes(token.content, is_added=True)
    return table, frozenset(i for i, token in added.items() if token.special)


def max_token_len(backend: tokenizers.Tokenizer, table: list[bytes]) -> int:
    """Characters of normalised text that one token can stand for; 0, unbounded, where that cannot be known:

    an added token swallows the spaces around it, text is dropped before it reaches the model, or any number of unknown
    characters become one token.
    """
    if any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values()):
        return 0
    if backend.pre_tokenizer is not None:
        for step in _flat(state_of(backend.pre_tokenizer), "pretokenizers"):
            keeps = step["type"] in ("ByteLevel", "Digits", "Metaspace") or (
                step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed"
            )
            if not keeps:
                return 0
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return 0
    if model.fuse_unk and model.unk_token is not None:
        has_all_bytes = all(backend.token_to_id(f"<0x{b:02X}>") is not None for b in range(256))
        if not (model.byte_fallback and has_all_bytes):
            return 0
    return max(map(len, table), default=0)


def state_of(part: Any) -> dict[str, Any]:
    """The JSON that a normalizer, pre-tokenizer, post-processor or decoder is written as in ``tokenizer.json``."""
    return json.loads(part.__getstate__())


def _flat(state: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The steps of a possibly nested ``Sequence``."""
    if state["type"] != "Sequence":
        return [state]
    return [step for part in state[key] for step in _flat(part, key)]
