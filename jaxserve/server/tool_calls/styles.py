"""The styles in which models write tool calls, and which one a chat template teaches.

hermes       <tool_call>{"name": "f", "arguments": {}}</tool_call>, any number (Hermes, Qwen 2.5 and 3)
llama3_json  {"name": "f", "parameters": {}} as the whole answer, several parted by ";" (Llama 3.1 and later),
             perhaps after <|python_tag|>
mistral      [TOOL_CALLS][{"name": "f", "arguments": {}}, ...], or as newer models do
             [TOOL_CALLS]f[CALL_ID]id[ARGS]{} for each call, the id optional
pythonic     [f(x=1, y="a"), g()] as the whole answer (Llama 3.2 and 4, prompted so): ``tool_calls.pythonic``
"""

from collections.abc import Callable, Mapping, Sequence

from jaxserve.server.tool_calls.deltas import Arguments, Content, Delta, Parser, Start
from jaxserve.server.tool_calls.json_call import SPACES, CallScanner, ValueScanner
from jaxserve.server.tool_calls.pythonic import PythonicParser
from jaxserve.server.tool_calls.reading import Reading

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class HermesParser:
    def __init__(self) -> None:
        self._reading = Reading()
        self._held = ""  # what may be the beginning of a tag, or waits for a call's end

    def feed(self, text: str) -> list[Delta]:
        for char in text:
            self._add(char)
        return self._reading.take()

    def finish(self) -> list[Delta]:
        held, self._held = self._held, ""
        if self._reading.call is not None and self._reading.call.name is None:
            held = TOOL_CALL + held
        if held and (self._reading.call is None or self._reading.call.state == "open"):
            self._reading.content(held)
        return self._reading.end()

    def _add(self, char: str) -> None:
        reading = self._reading
        if reading.call is None:
            self._held += char
            if self._held == TOOL_CALL:
                self._held, reading.call = "", CallScanner()
                return
            while self._held and not TOOL_CALL.startswith(self._held):
                reading.content(self._held[0])
                self._held = self._held[1:]
            return
        if reading.call.state == "open":
            if reading.scan(char) != "broken":
                return
            if reading.call.name is None:  # no call after all: the tag was text
                text, reading.call = TOOL_CALL + reading.call.raw, None
                for text_char in TOOL_CALL:
                    reading.content(text_char)
                for text_char in text[len(TOOL_CALL) :]:
                    self._add(text_char)
            return
        # The object has ended, or broke after its name: nothing up to the closing tag belongs to anything.
        self._held += char
        if self._held.endswith(END_TOOL_CALL):
            self._held, reading.call = "", None
        elif self._held.endswith(TOOL_CALL):  # some models forget to close
            self._held, reading.call = "", CallScanner()


class Llama3Parser:
    def __init__(self) -> None:
        self._reading = Reading()
        self._held = ""
        self._mode = "start"  # then "calls", or "text" for good

    def feed(self, text: str) -> list[Delta]:
        for char in text:
            self._add(char)
        return self._reading.take()

    def finish(self) -> list[Delta]:
        call = self._reading.call
        if self._mode == "start":
            self._reading.content(self._held)
        elif call is not None and call.name is None:
            self._reading.call = None
            self._reading.content(self._held[:-1] + call.raw)
        self._held = ""
        return self._reading.end()

    def _add(self, char: str) -> None:
        reading = self._reading
        if self._mode == "text":
            reading.content(char)
        elif self._mode == "start":
            self._held += char
            begun = self._held.lstrip(SPACES)
            if begun.startswith(PYTHON_TAG):
                begun = begun.removeprefix(PYTHON_TAG).lstrip(SPACES)
            elif PYTHON_TAG.startswith(begun):
                return
            if begun.startswith("{"):
                self._mode, reading.call = "calls", CallScanner()
                self._scan(char)
            elif begun:
                self._become_text(self._held)
        elif reading.call is not None:
            self._scan(char)
        elif char == "{":
            reading.call = CallScanner()
            self._scan(char)
        elif char not in SPACES + ";":
            self._become_text(char)

    def _scan(self, char: str) -> None:
        reading = self._reading
        state = reading.scan(char)
        assert reading.call is not None
        if state == "done":
            self._held, reading.call = "", None
        elif state == "broken":
            call, reading.call = reading.call, None
            if call.name is None:
                self._become_text(self._held[:-1] + call.raw)
            else:
                self._become_text("")

    def _become_text(self, text: str) -> None:
        self._mode, self._held = "text", ""
        self._reading.content(text)


class MistralParser:
    def __init__(self) -> None:
        self._reading = Reading()
        self._held = ""
        self._mode = "text"  # then "tag" after [TOOL_CALLS], "list", "name", "arguments"
        self._value = ValueScanner()

    def feed(self, text: str) -> list[Delta]:
        for char in text:
            getattr(self, f"_in_{self._mode}")(char)
        return self._reading.take()

    def finish(self) -> list[Delta]:
        if self._mode in ("text", "name"):
            self._reading.content((TOOL_CALLS if self._mode == "name" else "") + self._held)
        elif self._mode == "tag":
            self._reading.content(TOOL_CALLS)
        return self._reading.end()

    def _in_text(self, char: str) -> None:
        self._held += char
        if self._held == TOOL_CALLS:
            self._held, self._mode = "", "tag"
            return
        while self._held and not TOOL_CALLS.startswith(self._held):
            self._reading.content(self._held[0])
            self._held = self._held[1:]

    def _in_tag(self, char: str) -> None:
        if char == "[":
            self._mode = "list"
        elif char == "{":  # one call without its list
            self._mode = "list"
            self._in_list(char)
        elif char not in SPACES:
            self._held, self._mode = char, "name"

    def _in_list(self, char: str) -> None:
        reading = self._reading
        if reading.call is None:
            if char == "{":
                reading.call = CallScanner()
            elif char == "]":
                self._mode = "text"
                return
            elif char in SPACES + ",":
                return
            else:
                self._mode = "text"
                reading.content(char)
                return
        state = reading.scan(char)
        if state == "open":
            return
        call, reading.call = reading.call, None
        if state == "broken":
            self._mode = "text"
            if call.name is None:
                reading.content(call.raw)

    def _in_name(self, char: str) -> None:
        self._held += char
        if char != "{":
            return
        name, _, after = self._held[:-1].partition(ARGS)
        name, _, call_id = name.partition(CALL_ID)
        if not name.strip() or after.strip():
            self._reading.content(TOOL_CALLS + self._held)
            self._held, self._mode = "", "text"
            return
        self._reading.start(name.strip(), call_id.strip() or None)
        self._held, self._mode, self._value = "", "arguments", ValueScanner()
        self._in_arguments(char)

    def _in_arguments(self, char: str) -> None:
        self._value.add(char)
        self._reading.arguments(char)
        if self._value.ended:
            self._mode = "text"


class ListParser:
    """The whole answer is a JSON list of calls: what a constrained answer is held to. What is no call of it is the
    beginning of one, cut short before its name, and no content."""

    def __init__(self) -> None:
        self._mistral = MistralParser()
        self._mistral.feed(TOOL_CALLS)

    def feed(self, text: str) -> list[Delta]:
        return _calls(self._mistral.feed(text))

    def finish(self) -> list[Delta]:
        return _calls(self._mistral.finish())


def _calls(deltas: Sequence[Delta]) -> list[Delta]:
    return [delta for delta in deltas if not isinstance(delta, Content)]


class NamedParser:
    """The whole answer is the arguments of one call."""

    def __init__(self, name: str):
        self._pending: list[Delta] = [Start(0, name)]

    def feed(self, text: str) -> list[Delta]:
        deltas, self._pending = self._pending, []
        return [*deltas, Arguments(0, text)] if text else deltas

    def finish(self) -> list[Delta]:
        return self.feed("")


STYLES: Mapping[str, Callable[[], Parser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3Parser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}
SPECIAL_MARKS = ("llama3_json", "mistral")  # styles whose marks are special tokens: text must keep them

MARKS: tuple[tuple[str, str | None], ...] = (
    ("func_name1(", "pythonic"),  # the example of Meta's prompt: [func_name1(params_name1=params_value1, ...), ...]
    ("<function=", None),  # XML inside of <tool_call> (Qwen3-Coder): not read
    (TOOL_CALL, "hermes"),
    (TOOL_CALLS, "mistral"),
    (PYTHON_TAG, "llama3_json"),
    ('"parameters": ', "llama3_json"),
)  # what a template writes -> its style; the first that occurs


def detect_style(chat_template: str | None) -> str | None:
    """The style that a chat template shows to its model; None where it is none of those known."""
    return next((style for mark, style in MARKS if mark in (chat_template or "")), None)


def make_parser(style: str) -> Parser:
    return STYLES[style]()
