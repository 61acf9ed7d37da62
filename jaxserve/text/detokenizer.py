"""Token by token to text, never half a character."""

import codecs

from jaxserve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of a growing sequence: every ``add`` and the final ``flush`` concatenated equal ``tokenizer.decode(ids)``
    with the same options.

    A token may end inside a UTF-8 character; its bytes wait until the character is whole or known to be ill-formed.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues_text: bool = False):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._strips_space = tokenizer.strips_first_space and not continues_text  # until the first byte
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Text that became final with this token, perhaps none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strips_space and data:
            data, self._strips_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The sequence has ended: U+FFFD for a character that stayed incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
