"""Chat templates: Jinja source from a checkpoint, run in a sandbox, as `transformers` runs it.

A template is code from a stranger: it sees only the messages and a few plain values, cannot reach attributes, files or
modules, cannot change what it is given, and ends within a few seconds whatever it does (`template_sandbox`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes

from jaxserve.text import template_sandbox
from jaxserve.text.template_sandbox import ExhaustedError, Sandbox, size_of

MAX_RENDERED_LEN = 2**24  # characters: far above any prompt, far below what hurts the host
MAX_DEPTH = 64  # of lists and objects in what a template is given

_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplateError(ValueError):
    """Messages that the template refuses or cannot render, or a template that is not valid Jinja."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source.
        special_tokens: texts the template sees by name (``bos_token``, ``eos_token``, ...).

    Raises:
        ChatTemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None):
        if len(source) > template_sandbox.MAX_SOURCE_LEN:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, at most {template_sandbox.MAX_SOURCE_LEN} are read"
            )
        self._source = source
        self._special_tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}
        try:
            self._code = Sandbox(_to_json).compile(source)
        except jinja2.TemplateSyntaxError as e:
            raise ChatTemplateError(f"the chat template is not valid: line {e.lineno}: {e.message}") from e
        except Exception as e:  # nested too deep for Jinja or for Python
            raise ChatTemplateError(f"the chat template is not valid: {type(e).__name__}: {e}") from e

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: each has a ``role`` and a ``content``, a string or a list of ``{"type": "text", "text": str}``;
                None or absent where there are ``tool_calls``. Other fields (``tool_calls``, ``name``, ``tool_call_id``,
                ``reasoning_content``) reach the template as they are. A list becomes one string, its texts joined by
                newlines, for a template that does not go through such lists. The ``arguments`` of tool calls reach the
                template as objects, or as JSON where it fails with objects; a content of None as "" where it fails.
            add_generation_prompt: end with what begins the answer.
            tools: JSON schemas of functions. None, not an empty list, is what a template takes for no tools.
            documents: texts to draw on.
            variables: what else the template reads (``enable_thinking``, ...), by name.

        Raises:
            ChatTemplateError: naming the index of a malformed message or the variable, with the template's own
                complaint, or with the limit that it went over.
        """
        check_messages(messages)
        given = dict(variables or {})
        for name in given:
            if not isinstance(name, str) or name in _OWN_VARIABLES:
                raise ChatTemplateError(f"variable {name!r:.40} cannot be set: it is an argument of its own")
        for name, values in (("tools", tools), ("documents", documents)):
            if values is not None and (isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence)):
                raise ChatTemplateError(f"{name} must be a list of objects, not {type(values).__name__}")
            for i, value in enumerate(values or ()):
                if not isinstance(value, Mapping):
                    raise ChatTemplateError(f"{name}[{i}] must be an object, not {type(value).__name__}")
        plain = {
            "messages": [self._message(_plain(m, f"messages[{i}]")) for i, m in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
            # templates test `tools is not none`: absent would read as present
            "tools": _plain(list(tools), "tools") if tools else None,
            "documents": _plain(list(documents), "documents") if documents else None,
        }
        inputs = {**self._special_tokens, **_plain(given, "variables"), **plain}
        try:
            size_of(inputs)
        except ExhaustedError:
            raise ChatTemplateError(
                f"the messages are longer than {template_sandbox.MAX_VALUE_LEN} characters"
            ) from None
        first_error = None
        for candidate in _readings(plain["messages"]):
            try:
                return self._run({**inputs, "messages": candidate})
            except ChatTemplateError as error:
                first_error = first_error or error
                if isinstance(error.__cause__, ExhaustedError):
                    break
        assert first_error is not None
        raise first_error

    def _run(self, inputs: dict[str, Any]) -> str:
        pieces, length = [], 0
        try:
            sandbox = Sandbox(_to_json)
            template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
            for piece in template.generate(inputs):
                length += len(piece)
                if length > MAX_RENDERED_LEN:
                    raise ExhaustedError(f"the rendered chat is longer than {MAX_RENDERED_LEN} characters")
                pieces.append(piece)
        except Exception as e:  # the template is foreign code: whatever it raises is the caller's bad input
            is_plain = isinstance(e, (jinja2.TemplateError, ExhaustedError))
            raise ChatTemplateError(f"the chat template failed: {e if is_plain else f'{type(e).__name__}: {e}'}") from e
        return "".join(pieces)

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether a loop of the template goes through a message's content."""
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", template_sandbox.GenerationBlocks]).parse(
            self._source
        )
        names = {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node)
        }
        loops = [loop.iter for loop in tree.find_all(nodes.For)]
        return any(_is_content(i) or (isinstance(i, nodes.Name) and i.name in names) for i in loops)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises ChatTemplateError, naming the index, unless every message is as ``ChatTemplate.render`` wants it."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatTemplateError("messages is empty: a chat needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{i}] must be a mapping, not {type(message).__name__}")
        if "role" not in message:
            raise ChatTemplateError(f"messages[{i}] has no 'role'")
        if not isinstance(message["role"], str):
            raise ChatTemplateError(f"messages[{i}]['role'] must be a string, not {type(message['role']).__name__}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            _check_parts(content, f"messages[{i}]['content']")
        elif content is None and message.get("tool_calls"):
            continue
        elif "content" not in message:
            raise ChatTemplateError(f"messages[{i}] has no 'content'")
        elif not isinstance(content, str):
            raise ChatTemplateError(f"messages[{i}]['content'] must be a string, not {type(content).__name__}")


def _check_parts(parts: Sequence[Any], name: str) -> None:
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ChatTemplateError(f"{name}[{i}] is {kind!r:.40}: only parts of type 'text' are supported")
        if not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"{name}[{i}]['text'] must be a string, not {type(part.get('text')).__name__}")


def _is_content(node: nodes.Node) -> bool:
    """Whether an expression is some message's content, perhaps filtered."""
    return any(n.attr == "content" for n in _chain(node) if isinstance(n, nodes.Getattr)) or any(
        isinstance(n.arg, nodes.Const) and n.arg.value == "content"
        for n in _chain(node)
        if isinstance(n, nodes.Getitem)
    )


def _chain(node: nodes.Node | None) -> Iterator[nodes.Node]:
    while node is not None:
        yield node
        node = node.node if isinstance(node, (nodes.Filter, nodes.Getattr)) else None


def _readings(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages in the forms that templates disagree about, the most usual first.

    Clients of the OpenAI protocol send the arguments of a call as a string of JSON, and None for the content beside
    calls. Most templates want an object there, some a string; some a string for the content too.
    """
    has_calls = any(message.get("tool_calls") for message in messages)
    has_none = any("content" in message and message["content"] is None for message in messages)
    for wants_string in (False, True) if has_none else (False,):
        for wants_object in (True, False) if has_calls else (True,):
            yield [_reading(message, wants_object, wants_string) for message in messages]


def _reading(message: dict[str, Any], wants_object: bool, wants_string: bool) -> dict[str, Any]:
    message = dict(message)
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], wants_object)
    if wants_string and "content" in message and message["content"] is None:
        message["content"] = ""
    return message


def _calls(calls: Any, wants_object: bool) -> Any:
    """Tool calls with their ``arguments`` an object, or its JSON; what is neither stays as it is."""
    if not isinstance(calls, list):
        return calls
    changed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if wants_object and isinstance(arguments, str):
            try:
                value = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                value = None
            arguments = value if isinstance(value, dict) else arguments
        elif not wants_object and isinstance(arguments, dict):
            arguments = _to_json(arguments)
        if isinstance(function, dict) and arguments is not None:
            call = {**call, "function": {**function, "arguments": arguments}}
        changed.append(call)
    return changed


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy in lists and dictionaries, so that nothing of the caller's is within a template's reach."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth >= MAX_DEPTH:
        raise ChatTemplateError(f"{name} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ChatTemplateError(f"{name} has a key that is not a string")
        return {key: _plain(part, f"{name}[{key!r:.40}]", depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{name}[{i}]", depth + 1) for i, part in enumerate(value)]
    raise ChatTemplateError(f"{name} must be plain data, not {type(value).__name__}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters, which a prompt does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
