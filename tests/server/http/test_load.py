"""Many clients at once over HTTP, of which some leave: the others' answers are exactly right, and nothing stays."""

import asyncio
import json
import os
import random

import httpx2

from tests.server.conftest import TIMEOUT_S, endless_engine
from tests.server.fake_engine import expected_text
from tests.server.http.conftest import web

NUM_STREAMS = 128


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_streams_that_leave_and_streams_that_stay():
    r = random.Random(0)
    async with web(endless_engine()) as site:
        await site.client.get("/health")
        tasks_before, files_before = len(asyncio.all_tasks()), num_files()
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=site.served.url, timeout=TIMEOUT_S, limits=limits) as client:

            async def one(i: int) -> None:
                prompt, num_tokens = f"prompt {i}", r.randint(1, 60)
                fate = r.choices(["stay", "whole", "leave", "deadline"], [4, 2, 3, 1])[0]
                body = {"prompt": prompt, "max_tokens": num_tokens, "stream": fate != "whole"}
                if fate == "leave":
                    body["max_tokens"] = 10**5
                headers = {"jaxserve-timeout-s": "0.05"} if fate == "deadline" else {}
                await asyncio.sleep(r.random() * 0.2)
                async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
                    if fate == "whole":
                        choice = json.loads(await answer.aread())["choices"][0]
                        assert choice["text"] == expected_text(prompt, num_tokens)
                        return
                    text, ended = "", False
                    async for line in answer.aiter_lines():
                        if not line.startswith("data: "):
                            continue
                        ended = line == "data: [DONE]" or '"error"' in line
                        if ended:
                            break
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                        if fate == "leave" and len(text) > 5:
                            break
                    assert text == expected_text(prompt, len(text))
                    assert fate != "stay" or (ended and len(text) == num_tokens)

            await asyncio.gather(*(one(i) for i in range(NUM_STREAMS)))
        assert await site.served.is_idle()
        async with asyncio.timeout(TIMEOUT_S):
            while len(asyncio.all_tasks()) > tasks_before or num_files() > files_before:
                await asyncio.sleep(0.005)
        engine = (await site.client.get("/engine")).json()
        assert engine["stats"]["num_running"] == 0 and engine["pages"]["sequences"] == []
