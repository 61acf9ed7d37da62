"""Every error of the HTTP front end, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from jaxserve.engine.async_engine import DuplicateRequestError, EngineFailedError, NotServingError
from jaxserve.engine.event_stream import SlowReaderError
from jaxserve.errors import QueueFullError, RequestError, UnknownLoraError
from jaxserve.request import FinishReason
from jaxserve.server.loras import NotAllowedError
from jaxserve.server.prompts import UnsupportedByModelError

RETRY_AFTER_S = 1
MAX_MESSAGE_LEN = 500  # a message has the value at fault: it need not be all of it


@dataclass(frozen=True)
class Kind:
    status: int
    type: str
    code: str | None


INVALID = Kind(400, "invalid_request_error", None)
TOO_LONG = Kind(400, "invalid_request_error", "context_length_exceeded")
UNAUTHORIZED = Kind(401, "authentication_error", "invalid_api_key")
NO_SUCH_MODEL = Kind(404, "invalid_request_error", "model_not_found")
NOT_FOUND = Kind(404, "invalid_request_error", "not_found")
NO_SUCH_METHOD = Kind(405, "invalid_request_error", "method_not_allowed")
BODY_TOO_SLOW = Kind(408, "invalid_request_error", "request_timeout")
ABORTED = Kind(409, "aborted", "aborted")
TOO_LARGE = Kind(413, "invalid_request_error", "request_too_large")
TOO_MANY = Kind(429, "rate_limit_error", "too_many_requests")
INTERNAL = Kind(500, "server_error", "internal_error")
NOT_SERVING = Kind(503, "server_error", "not_serving")
DEADLINE = Kind(504, "server_error", "deadline_exceeded")

KINDS: tuple[tuple[type[Exception], Kind], ...] = (
    (DuplicateRequestError, Kind(409, "invalid_request_error", "duplicate_request_id")),
    (UnsupportedByModelError, Kind(400, "invalid_request_error", "unsupported_by_model")),
    (UnknownLoraError, NO_SUCH_MODEL),
    (NotAllowedError, Kind(403, "invalid_request_error", "not_allowed")),
    (RequestError, INVALID),
    (QueueFullError, Kind(429, "rate_limit_error", "queue_full")),
    (SlowReaderError, Kind(408, "aborted", "slow_reader")),
    (NotServingError, NOT_SERVING),
    (EngineFailedError, Kind(503, "server_error", "engine_failed")),
)  # the first that matches
ANSWERED = tuple(kind for kind, _ in KINDS)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


STATUSES = {
    400: "A field is wrong, unknown or not supported: `param` names it.",
    401: "The bearer token is missing or wrong.",
    403: "The server takes no adapters from there.",
    404: "No such model, or no such path.",
    408: "The body came too slowly.",
    409: "The request id is in use, or the request was aborted.",
    413: "The body is too large.",
    429: "The queue is full: retry later.",
    500: "The engine failed, or a bug.",
    503: "The server is loading, draining or has failed.",
    504: "The request's deadline passed.",
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in STATUSES.items()
}  # for the OpenAPI document


class HTTPError(HTTPException):
    """An error that is known by its kind."""

    def __init__(self, kind: Kind, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(kind.status, message, headers)
        self.kind, self.param = kind, param

    def __str__(self) -> str:
        return self.detail


def error_of(error: Exception, asked: str = "") -> HTTPError:
    """``error`` as it is answered. What is none of ``ANSWERED`` is a bug, and its text stays here.

    Args:
        asked: method and path, which the framework's own errors do not tell.
    """
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):  # the framework's own
        kind = {404: NOT_FOUND, 405: NO_SUCH_METHOD}.get(error.status_code, INVALID)
        message = "the body is not JSON" if kind is INVALID else f"{asked}: {error.detail}"
        return HTTPError(kind, message, headers=error.headers)
    kind = next((kind for known, kind in KINDS if isinstance(error, known)), None)
    if kind is None:
        return HTTPError(INTERNAL, "internal error: the server's log has it")
    if kind is INVALID and "max_model_len" in str(error):
        kind = TOO_LONG
    return HTTPError(kind, str(error), error.field if isinstance(error, RequestError) else None)


def body_of(error: HTTPError) -> dict[str, Any]:
    kind, message = error.kind, str(error)
    if len(message) > MAX_MESSAGE_LEN:
        message = f"{message[: MAX_MESSAGE_LEN // 2]} ... {message[-MAX_MESSAGE_LEN // 2 :]}"
    return {"error": {"message": message, "type": kind.type, "param": error.param, "code": kind.code}}


def response_of(error: HTTPError) -> JSONResponse:
    headers = dict(error.headers or {})  # of 405: which methods there are
    if error.kind.status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if error.kind is UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error), error.kind.status, headers)


def unfinished(reason: FinishReason | None, state: str) -> HTTPError | None:
    """The error of a choice that ended for ``reason``, with the engine in ``state``; None if that is an answer."""
    if reason == "deadline":
        return HTTPError(DEADLINE, "the request's deadline passed")
    if reason == "abort":
        if state != "ready":
            return HTTPError(NOT_SERVING, "the server is shutting down: the request was aborted")
        return HTTPError(ABORTED, "the request was aborted")
    return None


def _validation_error(error: RequestValidationError) -> HTTPError:
    """The first of the errors, with the path of its value as ``param``."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return error_of(cause)
    where = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return HTTPError(INVALID, f"the body is not JSON: {cause} at character {where[0] if where else 0}")
    param = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, where))) or None
    if first["type"] == "extra_forbidden":
        return HTTPError(INVALID, f"{param}: unknown field", param)
    if param is None:
        return HTTPError(INVALID, "the body must be a JSON object, with content-type: application/json")
    if first["type"] == "missing":
        return HTTPError(INVALID, f"{param}: is missing", param)
    text = repr(first.get("input"))
    return HTTPError(INVALID, f"{param}: {text if len(text) <= 80 else text[:77] + '...'}: {first['msg']}", param)
