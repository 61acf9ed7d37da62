"""Routes whose bodies are JSON, and whose JSON is text throughout."""

import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute

from jaxserve.server.http.errors import INVALID, HTTPError
from jaxserve.server.prompts import check_unicode

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped; whole pairs, too


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Any:
            check_body(await request.body())
            return await handle(request)

        return checked


class Routes(APIRouter):
    """An ``APIRouter`` that refuses bodies which are not Unicode, before they are read."""

    def __init__(self, **options: Any):
        super().__init__(route_class=_Route, **options)


def check_body(body: bytes) -> None:
    """Raises HTTPError or RequestError for a body that is not UTF-8, or has a text that is no Unicode.

    JSON's reader takes surrogates from UTF-8, and UTF-16 by its zero bytes: both are refused here.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise HTTPError(INVALID, f"the body is not JSON: not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise HTTPError(INVALID, f"the body is not JSON: a zero byte at byte {body.index(0)}")
    check_text(text)


def check_text(text: str) -> None:
    """Raises RequestError for JSON with a text that is no Unicode. What is no JSON is somebody else's to refuse."""
    if _SURROGATE.search(text) is None:
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    check_unicode("", value)
