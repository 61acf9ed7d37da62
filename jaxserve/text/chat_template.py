"""Chat templates: Jinja source from a checkpoint, run in a sandbox, as `transformers` runs it.

A template is code from a stranger: it sees only the messages and a few plain values, cannot reach attributes or
mutate what it is given, and cannot write more than ``MAX_RENDERED_LEN`` characters.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_LEN = 64 * 2**20  # characters: far above any prompt, far below what hurts the host


class ChatTemplateError(ValueError):
    """Messages that the template refuses or cannot render, or a template that is not valid Jinja."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source.
        bos_token, eos_token: texts the template sees under these names; None where the model has none.

    Raises:
        ChatTemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise ChatTemplateError(f"the chat template is not valid: line {e.lineno}: {e.message}") from e

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation: each message has exactly ``role`` and ``content``, both strings.

        Raises:
            ChatTemplateError: naming the index of a malformed message, or with the template's own complaint.
        """
        check_messages(messages)
        variables = {
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,  # templates test `tools is not none`: absent would read as present
            "documents": None,
            **self._special,
        }
        pieces, length = [], 0
        try:
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > MAX_RENDERED_LEN:
                    raise ChatTemplateError(f"the rendered chat is longer than {MAX_RENDERED_LEN} characters")
                pieces.append(piece)
        except ChatTemplateError:
            raise
        except Exception as e:  # the template is foreign code: whatever it raises is the caller's bad input
            message = str(e) if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}: {e}"
            raise ChatTemplateError(f"the chat template failed: {message}") from e
        return "".join(pieces)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ChatTemplateError, naming the index, unless every message is ``{"role": str, "content": str}``."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatTemplateError("messages is empty: a chat needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{i}] must be a mapping, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ChatTemplateError(f"messages[{i}] has no {key!r}")
            if not isinstance(message[key], str):
                raise ChatTemplateError(f"messages[{i}][{key!r}] must be a string, not {type(message[key]).__name__}")
        for key in message:
            if key not in ("role", "content"):
                raise ChatTemplateError(f"messages[{i}] has {key!r}: only 'role' and 'content' are supported")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters, which a prompt does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
