"""What a parser of tool calls gives."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True)
class Start:
    """Call number ``index`` (from 0) begins."""

    index: int
    name: str
    call_id: str | None = None  # where the model writes one


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of call ``index``, JSON text."""

    index: int
    text: str


Delta = Content | Start | Arguments


class Parser(Protocol):
    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """The text has ended."""
        ...
