"""Structured logs: one JSON object a line, requests among them."""

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from jaxserve.request import Request, TokenEvent

requests = logging.getLogger("jaxserve.requests")  # a line for each request of the engine, at its end
access = logging.getLogger("jaxserve.access")  # a line for each HTTP request

FIELDS = "fields"  # of a record: what goes into its object besides the text


class JSONFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, the record's own fields, and ``exception`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class RequestLog:
    """An observer of the engine's events that logs each request when it ends: its size and times, not its texts."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}  # when an unfinished request's first token came, monotonic seconds
        self._num_tokens: dict[str, int] = {}  # of an unfinished request's choices that have ended

    def observe(self, request: Request, event: TokenEvent) -> None:
        """Wants the first event and the last of every choice."""
        if not requests.isEnabledFor(logging.INFO):
            return
        now = time.monotonic()
        if event.token_id is not None:
            self._first.setdefault(request.request_id, now)
        if event.usage is not None:
            so_far = self._num_tokens.get(request.request_id, 0)
            self._num_tokens[request.request_id] = so_far + event.usage.completion_tokens
        if not event.ends_request:
            return
        first = self._first.pop(request.request_id, None)
        fields = {
            "request_id": request.request_id,
            "finish_reason": event.finish_reason,
            "n": request.params.n,
            "lora": None if request.adapter is None else request.adapter.name,
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": self._num_tokens.pop(request.request_id, 0),
            "cached_tokens": event.usage.cached_tokens if event.usage is not None else None,
            "ttft_s": None if first is None else round(first - request.arrival, 6),
            "e2e_s": round(now - request.arrival, 6),
        }
        requests.info("request ended: %s", event.finish_reason, extra={FIELDS: fields})


def set_up(kind: str, stream: TextIO | None = None) -> None:
    """Logs of the process on ``stream`` (stderr): "text", the server's own events; "json", those and every request."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter() if kind == "json" else logging.Formatter("%(levelname)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    for logger in (requests, access):
        logger.setLevel(logging.INFO if kind == "json" else logging.WARNING)
