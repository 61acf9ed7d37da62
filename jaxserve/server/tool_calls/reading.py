"""What the parsers of all styles share."""

from jaxserve.server.tool_calls.deltas import Arguments, Content, Delta, Start
from jaxserve.server.tool_calls.json_call import SPACES, CallScanner


class Reading:
    """What the styles share: the text that waits, the calls so far, and content with its spaces in the right place.

    Spaces at the end of content wait until it is known what follows: before calls that end the answer they are the
    format's, not the answer's, as are those after a call.
    """

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.num_calls = 0
        self.call: CallScanner | None = None
        self._spaces = ""
        self._after_call = False
        self._has_content = False

    def content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip(SPACES)
        if not text:
            return
        self._after_call = False
        text = self._spaces + text
        kept = text.rstrip(SPACES)
        self._spaces = text[len(kept) :]
        if kept:
            self._content(kept)

    def _content(self, text: str) -> None:
        self._has_content = True
        if self.deltas and isinstance(last := self.deltas[-1], Content):
            self.deltas[-1] = Content(last.text + text)
        else:
            self.deltas.append(Content(text))

    def start(self, name: str, call_id: str | None) -> None:
        self._after_call = True
        if not self._has_content:
            self._spaces = ""
        self.deltas.append(Start(self.num_calls, name, call_id))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        if not text:
            return
        last = self.deltas[-1] if self.deltas else None
        if isinstance(last, Arguments) and last.index == self.num_calls - 1:
            self.deltas[-1] = Arguments(last.index, last.text + text)
        else:
            self.deltas.append(Arguments(self.num_calls - 1, text))

    def scan(self, char: str) -> str:
        """Gives the call one character; returns its state. Of a broken one without a name ``raw`` is text."""
        assert self.call is not None
        named = self.call.name is not None
        self.call.add(char)
        if not named and self.call.name is not None and self.call.state != "broken":
            self.start(self.call.name, self.call.call_id)
        if self.call.name is not None:
            self.arguments(self.call.take_arguments())
        return self.call.state

    def take(self) -> list[Delta]:
        deltas, self.deltas = self.deltas, []
        return deltas

    def end(self) -> list[Delta]:
        if self.call is not None and self.call.name is None:
            self.content(self.call.raw)
        self.call = None
        if self._spaces and not self.num_calls:
            self._content(self._spaces)
        self._spaces = ""
        return self.take()
