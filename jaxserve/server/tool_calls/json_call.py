"""One call as a JSON object, ``{"name": ..., "arguments": {...}}``, read character by character."""

import json

SPACES = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")
MAX_HELD_LEN = 2**16  # characters of what may still be a call: no name is so far in


class ValueScanner:
    """Finds where one JSON value ends. ``add`` takes its characters, the first included; ``ended`` once it is whole.

    Only strings and brackets are looked at: what is between them is passed on as it is. A number or a word ends before
    the character that is none of its own, and that character is the caller's (``add`` returns False).
    """

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_word = False

    def add(self, char: str) -> bool:
        """Whether ``char`` belongs to the value."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.ended = self._depth == 0
            return True
        if self._depth == 0 and self._in_word and char in ",}]" + SPACES:
            self.ended = True
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.ended = self._depth <= 0
        elif self._depth == 0:
            self._in_word = True
        return True


class CallScanner:
    """Reads the object of one call; the first character given is its ``{``.

    Attributes:
        name, call_id: once they are known.
        arguments: what has come of the arguments since it was last taken, by ``take_arguments``.
        raw: everything given, until the name is known: it is content if there never is one.
        state: "open"; "done" after the last character; "broken" where it is no call.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.call_id: str | None = None
        self._raw: list[str] = []
        self.state = "open"
        self._pieces: list[str] = []
        self._has_arguments = False
        self._key: str | None = None
        self._value: ValueScanner | None = None
        self._text: list[str] = []  # of a key, or of a value that is not passed on as it comes
        self._expects = "{"

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def take_arguments(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def add(self, char: str) -> None:
        if self.name is None:
            self._raw.append(char)
            if len(self._raw) > MAX_HELD_LEN:
                self.state = "broken"
                return
        if self._value is not None and self._add_to_value(char):
            return
        if char in SPACES:
            return
        if self._expects == "{" and char == "{":
            self._expects = "key or }"
        elif self._expects in ("key or }", "key") and char == '"':
            self._key = None
            self._begin(char)
        elif self._expects == ":" and char == ":":
            self._expects = "value"
        elif self._expects == "value" and char not in ",}]:":
            self._begin(char)
        elif self._expects == ", or }" and char == ",":
            self._expects = "key"
        elif self._expects in (", or }", "key or }") and char == "}":
            self._end()
        else:
            self.state = "broken"

    def _begin(self, char: str) -> None:
        self._value = ValueScanner()
        self._text = []
        self._streams = self._key in ARGUMENT_KEYS and char == "{"
        self._has_arguments |= self._streams
        self._add_to_value(char)

    def _add_to_value(self, char: str) -> bool:
        assert self._value is not None
        taken = self._value.add(char)
        if taken:
            (self._pieces if self._streams else self._text).append(char)
        if self._value.ended:
            self._value = None
            self._ended_value()
        return taken

    def _ended_value(self) -> None:
        if self._expects in ("key or }", "key"):
            self._key = self._read(str)
            self._expects = ":"
            return
        if self._key == "name":
            self.name = self._read(str)
        elif self._key == "id":
            self.call_id = self._read(str)
        elif self._key in ARGUMENT_KEYS and not self._streams:
            self._other_arguments()
        self._expects = ", or }"

    def _other_arguments(self) -> None:
        """Arguments that are no object: a string of JSON, as some models write them, or null for none."""
        text = "".join(self._text)
        if text.startswith('"'):
            self._pieces.append(self._read(str) or "{}")
        elif text == "null":
            self._pieces.append("{}")
        else:
            self._pieces.append(text)
        self._has_arguments = True

    def _read(self, kind: type) -> str | None:
        try:
            value = json.loads("".join(self._text))
        except ValueError:
            value = None
        if not isinstance(value, kind):
            self.state = "broken"
            return None
        return value

    def _end(self) -> None:
        if self.name is None:
            self.state = "broken"
            return
        if not self._has_arguments:
            self._pieces.append("{}")
        self.state = "done"
