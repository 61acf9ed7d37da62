"""Text to token ids and back.

Decoding rests on one table, token id -> bytes: the text of a sequence is the concatenation of its tokens' bytes,
decoded as UTF-8 with each ill-formed part replaced by U+FFFD. The incremental detokenizer reads the same table,
so a stream cannot differ from a whole decode.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import decoders

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError


class TokenizerError(ValueError):
    """Text that cannot be encoded, or a tokenizer that this package cannot serve."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, inverted: printable Latin-1 is itself, the rest follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for i, b in enumerate(b for b in range(256) if b not in printable):
        table[chr(0x100 + i)] = b
    return table


BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A byte-level tokenizer with the ids and the chat template that its model uses. Immutable, safe in any thread.

    Attributes:
        vocab_size: one more than the highest token id. A model may have more rows: their ids have no text.
        eos_token_ids: ids that end a generation.
        bos_token_id, add_bos: the beginning-of-sequence id, and whether ``encode`` puts it first.
        chat_template: Jinja source, None where the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ):
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(f"tokenizer decoder {backend.decoder!r} is not supported, only ByteLevel is")
        if backend.truncation is not None or backend.padding is not None:
            raise TokenizerError("the tokenizer truncates or pads: turn both off")
        if add_bos and bos_token_id is None:
            raise TokenizerError("add_bos is set but there is no bos_token_id")
        self._backend = backend
        self._token_bytes, self._special_ids = _token_table(backend)
        self.vocab_size = len(self._token_bytes)
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.add_bos = add_bos
        self._prefix = [bos_token_id] if add_bos and bos_token_id is not None else []
        self.chat_template = chat_template
        # Bytes that one token can stand for; 0, unbounded, where an added token swallows the spaces around it.
        strips = any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
        self._max_token_len = 0 if strips else max(map(len, self._token_bytes), default=0)
        for name, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", (bos_token_id,))):
            for i in ids:
                if i is not None and not 0 <= i < self.vocab_size:
                    raise TokenizerError(f"{name}: {i} is not a token id, the vocabulary has {self.vocab_size}")

    @classmethod
    def from_backend(
        cls,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """A tokenizer around a `tokenizers` object, which the caller no longer changes.

        Its post-processor is not used: ``add_bos`` alone decides what ``encode`` adds.

        Raises:
            TokenizerError: the decoder is not ByteLevel, the backend truncates or pads, or an id is out of range.
        """
        return cls(
            backend,
            eos_token_ids=eos_token_ids,
            bos_token_id=bos_token_id,
            add_bos=add_bos,
            chat_template=chat_template,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written in the text become their ids.

        Bytes for which the vocabulary has no token (models trained on little text lack a few) are dropped, as by the
        tokenizers that such models were trained with.

        Raises:
            TokenizerError: ``text`` has a lone surrogate, which no encoding of Unicode can carry.
        """
        check_unicode(text)
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return self._prefix + ids if add_special_tokens else ids

    def min_num_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))`` in a small part of its time: refuses a huge prompt at the door.

        Raises:
            TokenizerError: as ``encode``.
        """
        check_unicode(text)
        if not self._max_token_len:
            return 0
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        return -(-len(text) // self._max_token_len)  # a character is at least one byte

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ill-formed UTF-8 becomes U+FFFD. Added tokens give their literal text."""
        skip = self._special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skip).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text; none for an id above the vocabulary (padding rows of a model)."""
        if token_id < 0:
            raise ValueError(f"token_id={token_id} must be at least 0")
        return self._token_bytes[token_id] if token_id < self.vocab_size else b""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which ``skip_special_tokens`` leaves out of the text."""
        return token_id in self._special_ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation of ``{"role": str, "content": str}`` messages.

        Raises:
            ChatTemplateError: no template, a malformed message (with its index), or the template's own complaint.
        """
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of ``render_chat``; one bos at most, whether the template or ``add_bos`` writes it."""
        ids = self.encode(
            self.render_chat(messages, add_generation_prompt=add_generation_prompt), add_special_tokens=False
        )
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    @cached_property
    def _template(self) -> ChatTemplate:  # compiled on first use: a broken template must not stop raw prompts
        if self.chat_template is None:
            raise ChatTemplateError("the model has no chat template: send a prompt instead of messages")
        return ChatTemplate(
            self.chat_template,
            bos_token=self._literal(self.bos_token_id),
            eos_token=self._literal(self.eos_token_ids[0] if self.eos_token_ids else None),
        )

    def _literal(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.token_bytes(token_id).decode("utf-8", errors="replace")


def check_unicode(text: str) -> None:
    """Raises TokenizerError where ``text`` has a lone surrogate: it came from bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(f"text is not valid Unicode: lone surrogate at character {e.start}") from None


def _token_table(backend: tokenizers.Tokenizer) -> tuple[list[bytes], frozenset[int]]:
    """Bytes of every token id, and the ids of special tokens."""
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        try:
            table[i] = bytes([BYTE_OF_CHAR[c] for c in token])
        except KeyError:  # not written in the byte alphabet: the token is its own text
            table[i] = token.encode()
    for i, token in added.items():
        table[i] = token.content.encode()
    return table, frozenset(i for i, token in added.items() if token.special)
