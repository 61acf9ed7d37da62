"""The interactive chat loop, whoever answers: an engine in this process or a server."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from jaxserve.cli.terminal import StreamStats, note, write_answer

Message = dict[str, str]
HELP = "/reset starts over, /exit or Ctrl-D leaves; Ctrl-C stops an answer, and leaves where there is none"


def converse(
    answer: Callable[[list[Message], StreamStats], Generator[str]], *, system: str | None, stats: bool
) -> None:
    """Reads lines and streams answers until /exit, end of input, or Ctrl-C at the prompt.

    ``answer`` streams the reply to a conversation as pieces of text and counts its tokens; closing it stops the reply,
    and a ValueError from it refuses the message, not the conversation. Each line is one message; the conversation so
    far goes with it. A reply that was stopped stays in the conversation as far as it came.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  input() then edits and recalls lines

        note(HELP)
    prompt = "> " if is_terminal and sys.stdout.isatty() else ""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            note(HELP)
        elif line:
            question = {"role": "user", "content": line}
            watch = StreamStats()
            try:
                text = _write_stream(answer([*messages, question], watch))
            except ValueError as error:
                note(f"error: {error} (/reset forgets the conversation)")
            else:
                messages += [question, {"role": "assistant", "content": text}]
                if stats:
                    note(watch.line())


def _write_stream(pieces: Generator[str]) -> str:
    """Writes the pieces as they come and returns them joined."""
    text = ""
    with _interrupts_counted() as interrupts:
        for piece in pieces:
            write_answer(piece)
            text += piece
            if interrupts:
                note(" [stopped]")
                break
    pieces.close()
    write_answer("\n")
    return text


@contextmanager
def _interrupts_counted() -> Iterator[list[int]]:
    """The first Ctrl-C in the block is appended to the list and nothing else: an engine must not be left in the middle
    of a step. The second raises KeyboardInterrupt as usual."""
    interrupts: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
