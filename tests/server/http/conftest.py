import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from tests.server.conftest import TIMEOUT_S, Serving, serving
from tests.server.fake_engine import FakeEngine


class Web:
    """A server before the fake engine, and an HTTP client of it."""

    def __init__(self, served: Serving, client: httpx2.AsyncClient):
        self.served = served
        self.engine = served.engine
        self.client = client

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer of a request that succeeds."""
        answer = await self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of one that does not."""
        answer = await self.client.post(path, json=body)
        assert answer.status_code >= 400, answer.text
        return answer.status_code, answer.json()["error"]

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer, which must end as it should."""
        answer = await self.client.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last, rest = answer.text.split("\n\n")
        assert last == "data: [DONE]" and rest == ""
        return [json.loads(event.removeprefix("data: ")) for event in events]


@asynccontextmanager
async def web(engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[Web]:
    async with (
        serving(engine, http_port=0, **options) as served,
        httpx2.AsyncClient(base_url=served.url, timeout=TIMEOUT_S) as client,
    ):
        yield Web(served, client)


@pytest.fixture
async def site() -> AsyncIterator[Web]:
    async with web() as running:
        yield running
