"""From what a client sent to what the engine takes: texts, token ids and chats, checked before they are tokenized.

Everything here may take long (a tokenizer is not fast): call it in a thread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.engine.core import EngineCore
from jaxserve.errors import RequestError
from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.tokenizer import Tokenizer, TokenizerError


class UnsupportedByModelError(RequestError):
    """The model lacks what the request needs."""


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """``error`` with its field as the client knows it."""
    if (name := names.get(error.field)) is None:
        return error
    return type(error)(name, str(error).removeprefix(f"{error.field}: "))


def tokenizer_of(engine: EngineCore, field: str) -> Tokenizer:
    """Raises UnsupportedByModelError, naming ``field``, where the engine has none."""
    if engine.tokenizer is None:
        raise UnsupportedByModelError(field, f"{engine.model_name} has no tokenizer: send and take token ids")
    return engine.tokenizer


def check_bytes(field: str, text: str, limit: int | None) -> None:
    """Refuses a text of more than ``limit`` UTF-8 bytes, and one that has none (a lone surrogate)."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(field, f"not valid Unicode at character {error.start}") from None
    if limit is not None and num_bytes > limit:
        raise RequestError(field, f"{num_bytes} bytes, this server takes at most {limit}")


def check_unicode(field: str, value: Any) -> None:
    """Refuses a value of JSON with a text that is none: escapes can spell half of a surrogate pair, which no answer
    could repeat. Names where in the value it is.

    Args:
        field: of the value; "" for a whole body, whose fields are then named.
    """
    waiting = [(field, value)]
    while waiting:
        where, part = waiting.pop()
        if isinstance(part, str):
            check_bytes(where, part, None)
        elif isinstance(part, list):
            waiting += [(f"{where}[{i}]", one) for i, one in enumerate(part) if not isinstance(one, int | float)]
        elif isinstance(part, dict):
            for name, one in part.items():
                here = f"{where}.{name}" if where else name
                check_bytes(here.encode(errors="backslashreplace").decode(), name, None)
                waiting.append((here, one))


def check_fits(engine: EngineCore, tokenizer: Tokenizer, field: str, text: str) -> None:
    """Refuses a text that cannot fit, without the time of tokenizing it (``make_request`` does so for its texts)."""
    max_model_len = engine.scheduler_config.max_model_len
    if (num_tokens := tokenizer.min_num_tokens(text)) > max_model_len:
        raise RequestError(field, f"at least {num_tokens} tokens, max_model_len={max_model_len}")


def encode_chat(
    engine: EngineCore,
    messages: Sequence[Mapping[str, Any]],
    max_bytes: int | None,
    *,
    cut: bool,
    encode: Callable[..., list[int]] = Tokenizer.encode_chat,
    **options: Any,
) -> list[int]:
    """Token ids of a chat.

    Args:
        cut: a prompt that is too long is no error, as its end alone will be read.
        encode: called with (tokenizer, messages, options).

    Raises RequestError naming ``messages``.
    """
    tokenizer = tokenizer_of(engine, "messages")
    if tokenizer.chat_template is None:
        raise UnsupportedByModelError("messages", f"{engine.model_name} has no chat template: send text")
    contents = "".join(_texts(messages))
    check_bytes("messages", contents, max_bytes)
    try:
        if not cut:
            check_fits(engine, tokenizer, "messages", contents)
        return encode(tokenizer, messages, **options)
    except (ChatTemplateError, TokenizerError) as error:
        raise RequestError("messages", str(error)) from error


def _texts(messages: Sequence[Any]) -> list[str]:
    """The texts of the messages' contents, as far as they have the form of texts: the template checks them."""
    texts = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                texts.append(text)
    return texts
