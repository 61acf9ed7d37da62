"""The page, and what it draws. ``scripts/check_page.py`` has it in a browser."""

import re
import threading

from jaxserve.request import HeldPages, PageMap
from jaxserve.server.http import live
from tests.server.conftest import endless_engine
from tests.server.http.conftest import Web, web


async def test_the_page_needs_nothing_from_elsewhere(site: Web):
    answer = await site.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|url\(|https?://|@import", answer.text)
    assert set(re.findall(r'fetch\("(.*?)"', answer.text)) == {"generate/stream", "engine"}
    used = set(re.findall(r'\$\("(\w+)"\)', answer.text))
    assert used <= set(re.findall(r'id="(\w+)"', answer.text))


async def test_the_engine_as_it_is_drawn():
    async with web(endless_engine()) as site:
        engine = (await site.client.get("/engine")).json()
        assert engine["state"] == "ready" and engine["model"] == "fake"
        assert engine["latency"] == dict.fromkeys(("ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s"))
        assert engine["pages"]["cells"] == [live.FREE] * 97 + [live.CACHED] * 3
        async with site.client.stream(
            "POST", "/generate/stream", json={"prompt": "a", "max_tokens": 10**5, "n": 2, "request_id": "r"}
        ) as stream:
            lines = stream.aiter_lines()
            for _ in range(8):
                await anext(lines)
            engine = (await site.client.get("/engine")).json()
            pages = engine["pages"]
            # The fake engine's requests share page 0 and have one of their own.
            assert pages["cells"][:4] == [0, 0, 1, live.FREE] and pages["shared"] == [0]
            assert [(s["request_id"], s["choice"], s["num_pages"]) for s in pages["sequences"]] == [
                ("r", 0, 2),
                ("r", 1, 2),
            ]
            assert 0 < engine["latency"]["itl_p50_s"] <= engine["latency"]["itl_p95_s"] < 10
            assert 0 < engine["latency"]["ttft_p50_s"] < 10
        assert await site.served.is_idle()
        engine = (await site.client.get("/engine")).json()
        assert engine["pages"]["sequences"] == [] and engine["stats"]["num_pages_held"] == 0


async def test_an_engine_that_loads_has_no_figures():
    may_build = threading.Event()
    async with web(may_build=may_build, wait_ready=False) as site:
        engine = (await site.client.get("/engine")).json()
        assert engine["state"] == "loading" and engine["stats"] is None
        assert (await site.client.get("/")).status_code == 200


def test_a_large_cache_is_drawn_in_few_cells():
    num_pages = 10 * live.MAX_CELLS + 1
    held = HeldPages(
        request_id="a",
        choice=0,
        num_tokens=5,
        num_output_tokens=1,
        is_running=True,
        num_preemptions=0,
        pages=(12, 13, 500),
    )
    pages = PageMap(num_pages=num_pages, page_size=16, cached=(14, 99), sequences=(held,))
    found = live.drawn(pages)
    assert found["pages_per_cell"] == 11 and len(found["cells"]) == -(-num_pages // 11) <= live.MAX_CELLS
    assert {i: c for i, c in enumerate(found["cells"]) if c != live.FREE} == {1: 0, 9: live.CACHED, 45: 0}
