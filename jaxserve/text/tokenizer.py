"""Text to token ids and back.

Decoding rests on one table, token id -> bytes: the text of a sequence is the concatenation of its tokens' bytes,
decoded as UTF-8 with each ill-formed part replaced by U+FFFD. The incremental detokenizer reads the same table,
so a stream cannot differ from a whole decode.

One thing is not in the table, because it belongs to a place and not to a token: the encoders of SentencePiece models
put a space before a text (``strips_first_space``), so a text decoded from its beginning loses one. A completion is not
at the beginning: it continues its prompt (``continues_text``) and keeps the space that parts its first word from it,
so that the text of prompt and completion together is the text of their tokens together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jaxserve.text.chat_template import ChatTemplate, ChatTemplateError
from jaxserve.text.decoding import TokenizerError, max_token_len, read_decoding, token_table


class Tokenizer:
    """A tokenizer with the ids and the chat template that its model uses. Immutable, safe in any thread.

    Attributes:
        vocab_size: one more than the highest token id. A model may have more rows: their ids have no text.
        eos_token_ids: ids that end a generation.
        bos_token_id, pad_token_id: None where the model has none.
        prefix_ids: what ``encode`` puts first: the bos id, another few, or nothing.
        strips_first_space: whether a text decoded from its beginning loses one space there.
        chat_template: Jinja source, None where the model has none. Of several, the one for chats without tools.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        prefix_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, Any] | None = None,
    ):
        if backend.truncation is not None or backend.padding is not None:
            raise TokenizerError("the tokenizer truncates or pads: turn both off")
        self._backend = backend
        decoding = read_decoding(backend)
        self._token_bytes, self._special_ids = token_table(backend, decoding)
        self.strips_first_space = decoding.strips_first_space
        self.vocab_size = len(self._token_bytes)
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.pad_token_id = pad_token_id
        self.prefix_ids = tuple(prefix_ids)
        templates = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        self._templates = templates
        self._compiled: dict[str, ChatTemplate] = {}  # by name; filled on first use, by whichever thread
        self.chat_template = templates.get("default", next(iter(templates.values()), None))
        self._max_token_len = max_token_len(backend, self._token_bytes)
        ids_by_name = {
            "eos_token_ids": self.eos_token_ids,
            "bos_token_id": (bos_token_id,),
            "pad_token_id": (pad_token_id,),
            "prefix_ids": self.prefix_ids,
        }
        for name, ids in ids_by_name.items():
            for i in ids:
                if i is not None and not 0 <= i < self.vocab_size:
                    raise TokenizerError(f"{name}: {i} is not a token id, the vocabulary has {self.vocab_size}")
        if special_tokens is None:
            eos_token_id = self.eos_token_ids[0] if self.eos_token_ids else None
            of_name = {"bos_token": bos_token_id, "eos_token": eos_token_id, "pad_token": pad_token_id}
            special_tokens = {name: backend.id_to_token(i) for name, i in of_name.items() if i is not None}
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_backend(cls, backend: tokenizers.Tokenizer, **options: Any) -> "Tokenizer":
        """A tokenizer around a `tokenizers` object, which the caller no longer changes.

        Its post-processor is not used: ``prefix_ids`` alone decides what ``encode`` adds.

        Args:
            eos_token_ids, bos_token_id, pad_token_id, prefix_ids: as the attributes.
            chat_template: Jinja source, or sources by name: with tools the one named ``tool_use``, else ``default``.
            special_tokens: texts that templates see by name (``bos_token``, ...); by default those of the ids.

        Raises:
            TokenizerError: the decoder is not supported, the backend truncates or pads, or an id is out of range.
        """
        return cls(backend, **options)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written in the text become their ids.

        Bytes for which the vocabulary has no token (models trained on little text lack a few) are dropped, as by the
        tokenizers that such models were trained with.

        Raises:
            TokenizerError: ``text`` has a lone surrogate, which no encoding of Unicode can carry.
        """
        check_unicode(text)
        ids = without_panic(lambda: self._backend.encode(text, add_special_tokens=False).ids)
        return [*self.prefix_ids, *ids] if add_special_tokens else ids

    def min_num_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))`` in a small part of its time: refuses a huge prompt at the door.

        Raises:
            TokenizerError: as ``encode``.
        """
        check_unicode(text)
        if not self._max_token_len:
            return 0
        if (normalizer := self._backend.normalizer) is not None:
            text = without_panic(lambda: normalizer.normalize_str(text))
        return -(-len(text) // self._max_token_len)  # a character is at least one byte

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continues_text: bool = False) -> str:
        """Text of ``ids``; ill-formed UTF-8 becomes U+FFFD. Added tokens give their literal text.

        ``continues_text``: the ids follow others that had text, so a space in front is theirs.
        """
        skip = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skip)
        if self.strips_first_space and not continues_text:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text; none for an id above the vocabulary (padding rows of a model)."""
        if token_id < 0:
            raise ValueError(f"token_id={token_id} must be at least 0")
        return self._token_bytes[token_id] if token_id < self.vocab_size else b""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which ``skip_special_tokens`` leaves out of the text."""
        return token_id in self._special_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; arguments and errors are ``ChatTemplate.render``'s.

        Raises:
            ChatTemplateError: no template, or as ``ChatTemplate.render``.
        """
        return self._template("tool_use" if tools and "tool_use" in self._templates else "default").render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of ``render_chat``; ``prefix_ids`` once, whether the template writes them or not."""
        ids = self.encode(self.render_chat(messages, **options), add_special_tokens=False)
        return ids if tuple(ids[: len(self.prefix_ids)]) == self.prefix_ids else [*self.prefix_ids, *ids]

    @property
    def tool_template(self) -> str | None:
        """Jinja source for chats with tools; None where the model has no chat template."""
        return self._templates.get("tool_use", self.chat_template)

    def _template(self, name: str) -> ChatTemplate:
        if not self._templates:
            raise ChatTemplateError("the model has no chat template: send a prompt instead of messages")
        if name not in self._templates:
            raise ChatTemplateError(
                f"the model has no chat template {name!r}, only {', '.join(map(repr, self._templates))}"
            )
        if name not in self._compiled:  # on first use: a broken template must not stop raw prompts
            self._compiled[name] = ChatTemplate(self._templates[name], special_tokens=self._special_tokens)
        return self._compiled[name]


def check_unicode(text: str) -> None:
    """Raises TokenizerError where ``text`` has a lone surrogate: it came from bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(f"text is not valid Unicode: lone surrogate at character {e.start}") from None


def without_panic[T](call: Callable[[], T]) -> T:
    """The result of a call into the Rust library, whose own bugs and refusals become TokenizerError."""
    try:
        return call()
    except Exception as e:
        raise TokenizerError(f"the tokenizer library refused: {e}") from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # it is not an Exception, and must not end the thread
            raise
        raise TokenizerError(f"the tokenizer library failed: {e}") from None
