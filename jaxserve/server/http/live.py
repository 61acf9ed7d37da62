"""``GET /`` and ``GET /engine``: a page to talk to the model and to watch the engine, and what it draws."""

import dataclasses
import time
from importlib import resources
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from jaxserve.request import PageMap
from jaxserve.server.http.backend import Backend

FREE, CACHED = -1, -2  # cells of the map that no sequence holds; others have an index into ``sequences``
MAX_CELLS = 4096  # of a map: of a larger cache several pages are one cell
MAX_SEQUENCES = 256  # told by name; the map has them all

# Nothing from elsewhere, and nowhere to send anything but here.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def live_routes(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["Operation"])
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "x-content-type-options": "nosniff"}

    @router.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        """A page to talk to the model and to watch the engine."""
        return HTMLResponse(page, headers=headers)

    @router.get("/engine")
    async def engine() -> dict[str, Any]:
        """State, figures, latencies of the last requests and the map of KV pages."""
        state, stats = backend.async_engine.state, backend.async_engine.stats()
        if stats is None or state not in ("ready", "draining"):
            return {"state": state, "time": time.monotonic(), "model": None, "stats": None}
        return {
            "state": state,
            "time": time.monotonic(),
            "model": backend.model_names()[0],
            "stats": dataclasses.asdict(stats),
            "latency": backend.recent.percentiles(),
            "pages": drawn(await backend.async_engine.page_map()),
        }

    return router


def drawn(pages: PageMap) -> dict[str, Any]:
    """The map as cells of ``pages_per_cell`` pages: of its pages' states the most used one."""
    pages_per_cell = -(-pages.num_pages // MAX_CELLS)
    cells = [FREE] * -(-pages.num_pages // pages_per_cell)
    for page in pages.cached:
        cells[page // pages_per_cell] = CACHED
    num_holders: dict[int, int] = {}
    for i, sequence in enumerate(pages.sequences):
        for page in sequence.pages:
            num_holders[page] = num_holders.get(page, 0) + 1
            if cells[page // pages_per_cell] < 0:
                cells[page // pages_per_cell] = i
    return {
        "num_pages": pages.num_pages,
        "page_size": pages.page_size,
        "pages_per_cell": pages_per_cell,
        "cells": cells,
        "shared": sorted({page // pages_per_cell for page, n in num_holders.items() if n > 1}),
        "sequences": [
            {
                "index": i,
                "request_id": s.request_id,
                "choice": s.choice,
                "num_tokens": s.num_tokens,
                "num_output_tokens": s.num_output_tokens,
                "is_running": s.is_running,
                "num_preemptions": s.num_preemptions,
                "num_pages": len(s.pages),
            }
            for i, s in enumerate(pages.sequences[:MAX_SEQUENCES])
        ],
    }
