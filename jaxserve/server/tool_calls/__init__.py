"""Tool calls that models write into their text, read while the text arrives.

Each style is a parser with ``feed(text)`` and ``finish()``, which return deltas in order; however the text is cut, the
deltas amount to the same. Arguments are passed on as the model wrote them, character for character: they are JSON if
the model's are. What turns out not to be a call is content.
"""

from jaxserve.server.tool_calls.deltas import Arguments, Content, Delta, Parser, Start
from jaxserve.server.tool_calls.styles import STYLES, detect_style, make_parser

__all__ = ["STYLES", "Arguments", "Content", "Delta", "Parser", "Start", "detect_style", "make_parser"]
