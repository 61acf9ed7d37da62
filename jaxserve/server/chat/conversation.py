"""From a chat request's messages to token ids."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.server.prompts import encode_chat
from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.tokenizer import Tokenizer


def encode_conversation(
    engine: EngineCore,
    messages: Any,
    max_bytes: int | None,
    *,
    cut: bool,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation. Raises RequestError naming the field.

    Args:
        max_bytes: of the messages' contents.
        cut: a prompt that is too long is cut, and so no error.
        add_generation_prompt: None: unless the last message is continued.
        variables: what else the template reads, by name.
    """
    if not isinstance(messages, list):
        raise RequestError("messages", f"{messages!r:.80} is not a list")
    if variables is not None and not isinstance(variables, Mapping):
        raise RequestError("chat_template_kwargs", f"{variables!r:.80} is not an object")
    if documents is not None and not isinstance(documents, list):
        raise RequestError("documents", f"{documents!r:.80} is not a list")
    if continue_final_message and add_generation_prompt:
        raise RequestError("continue_final_message", "true, but add_generation_prompt is true, too")
    tokenizer = engine.tokenizer
    if tokenizer is not None and "developer" not in (tokenizer.tool_template or ""):
        messages = [_without_developer(message) for message in messages]
    return encode_chat(
        engine,
        messages,
        max_bytes,
        cut=cut,
        encode=_encode_continued if continue_final_message else Tokenizer.encode_chat,
        add_generation_prompt=not continue_final_message if add_generation_prompt is None else add_generation_prompt,
        tools=tools,
        documents=documents,
        variables=variables,
    )


def _without_developer(message: Any) -> Any:
    """The role that OpenAI has renamed, as templates know it."""
    is_developer = isinstance(message, Mapping) and message.get("role") == "developer"
    return {**message, "role": "system"} if is_developer else message


def _encode_continued(tokenizer: Tokenizer, messages: list[Any], **options: Any) -> list[int]:
    """The prompt ends within the last message, at the end of its content.

    Where that is in the rendered text a mark tells, which no template can mistake for anything of its own.
    """
    mark = secrets.token_hex(16)
    text = tokenizer.render_chat([*messages[:-1], _marked(messages[-1] if messages else None, mark)], **options)
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ChatTemplateError("continue_final_message: the chat template does not write the last message's text once")
    ids = tokenizer.encode(before, add_special_tokens=False)
    return ids if tuple(ids[: len(tokenizer.prefix_ids)]) == tokenizer.prefix_ids else [*tokenizer.prefix_ids, *ids]


def _marked(message: Any, mark: str) -> dict[str, Any]:
    """``message`` with ``mark`` at the end of its text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return {**message, "content": content + mark}
    parts = content if isinstance(content, list) else []
    if parts and isinstance(parts[-1], Mapping) and isinstance(parts[-1].get("text"), str):
        return {**message, "content": [*parts[:-1], {**parts[-1], "text": parts[-1]["text"] + mark}]}
    raise ChatTemplateError("continue_final_message: the last message has no text to continue")
