"""Calls as a Python list, the whole answer: ``[f(x=1, y="a"), g()]`` (Llama 3.2 and 4, ToolACE).

Values are Python's literals, and JSON's ``true``, ``false`` and ``null``; they are passed on as JSON, each when it is
whole. A call is one from its first whole argument on, or, without arguments, from what follows it: until then its text
may be the answer's own.
"""

import ast
import json

from jaxserve.server.tool_calls.deltas import Delta
from jaxserve.server.tool_calls.json_call import MAX_HELD_LEN, SPACES
from jaxserve.server.tool_calls.reading import Reading

JSON_WORDS = ("true", "false", "null")


class PythonicParser:
    def __init__(self) -> None:
        self._reading = Reading()
        self._held = ""  # what is content if it turns out to be no call
        self._mode = "start"  # then "name", "key", "value", "after" a call; "text" for good
        self._word = ""  # the name, key or value that is being read
        self._name = ""
        self._key = ""
        self._keys: set[str] = set()  # of the call
        self._begun = False  # the call is one
        self._scanner = _LiteralScanner()

    def feed(self, text: str) -> list[Delta]:
        for char in text:
            if self._mode == "text":
                self._reading.content(char)
                continue
            self._held += char
            getattr(self, f"_in_{self._mode}")(char)
            if len(self._held) > MAX_HELD_LEN:
                self._become_text()
        return self._reading.take()

    def finish(self) -> list[Delta]:
        if self._mode == "after" and not self._begun:  # whole, and its list not closed
            self._begin()
        elif self._mode != "text" and not self._reading.num_calls:
            self._become_text()
        return self._reading.end()

    def _become_text(self) -> None:
        held, self._held, self._mode = self._held, "", "text"
        self._reading.content(held)

    def _begin(self) -> None:
        """What was held is a call's: its beginning, or all of one without arguments."""
        self._reading.start(self._name, None)
        self._begun, self._held = True, ""
        if self._mode == "after":
            self._reading.arguments("{}")

    def _in_start(self, char: str) -> None:
        if char == "[":
            self._mode, self._word = "name", ""
        elif char not in SPACES:
            self._become_text()

    def _in_name(self, char: str) -> None:
        if char == "(" and self._word:
            self._name, self._word, self._mode = self._word, "", "key"
            self._keys, self._begun = set(), False
        elif self._is_of_word(char) or (char in ".-" and self._word):
            self._word += char
        elif char not in SPACES or self._word:
            self._become_text()

    def _in_key(self, char: str) -> None:
        if char == "=" and self._word.strip() and self._word.strip() not in self._keys:
            self._key, self._mode = self._word.strip(), "value"
            self._keys.add(self._key)
            self._word, self._scanner = "", _LiteralScanner()
        elif char == ")" and not self._word.strip():  # also after a comma, as Python allows
            self._end_call()
        elif char in SPACES or (self._is_of_word(char) and self._word == self._word.rstrip(SPACES)):
            self._word = (self._word + char).lstrip(SPACES)
        else:
            self._become_text()

    def _in_value(self, char: str) -> None:
        if not self._scanner.ends_before(char):
            self._word += char
            return
        value = _as_json(self._word)
        if char == "]" or value is None:
            self._become_text()
            return
        if not self._begun:
            self._begin()
        self._held = ""
        before = "{" if len(self._keys) == 1 else ", "
        self._reading.arguments(f"{before}{json.dumps(self._key, ensure_ascii=False)}: {value}")
        self._word, self._mode = "", "key"
        if char == ")":
            self._end_call()

    def _end_call(self) -> None:
        if self._begun:
            self._reading.arguments("}")
        self._mode = "after"

    def _in_after(self, char: str) -> None:
        if char in ",]":
            if not self._begun:
                self._begin()
            self._held, self._mode, self._word = "", "name" if char == "," else "text", ""
        elif char not in SPACES:
            self._become_text()

    def _is_of_word(self, char: str) -> bool:
        return char == "_" or char.isalpha() or (char.isdigit() and bool(self._word))


class _LiteralScanner:
    """Finds where a Python literal ends: at a comma or a bracket that is none of its own."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def ends_before(self, char: str) -> bool:
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif self._depth == 0 and char in ",)]}":
            return True
        elif char in ")]}":
            self._depth -= 1
        return False


def _as_json(text: str) -> str | None:
    """A Python literal as JSON; None where it is none, or has no JSON (bytes, sets, infinities)."""
    text = text.strip()
    if text in JSON_WORDS:
        return text
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
