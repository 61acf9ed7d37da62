"""A server before two replicas, over gRPC and HTTP: nobody sees that there are two, but whoever asks."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve import Engine
from jaxserve.engine import async_engine
from jaxserve.server.client_codec import Chunk
from tests import tiny
from tests.halt import Halt, all_replicas_run
from tests.oracle import oracle_greedy
from tests.server.conftest import TIMEOUT_S, serving

CONFIG = replace(tiny.CONFIG, num_layers=1)
BASE = replace(tiny.params(), layers=tiny.params().layers[:1])
SIZES: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 3, "num_pages": 40, "page_size": 4,
                         "prefill_sizes": (16,), "decode_sizes": (3,), "samplings": ("any",)}  # fmt: skip


async def reasons(chunks: AsyncIterator[Chunk]) -> list[str | None]:
    return [chunk.finish_reason async for chunk in chunks]


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        return response.read().decode()


async def test_a_server_of_two_replicas(monkeypatch: pytest.MonkeyPatch):
    engine = Engine.from_params(CONFIG, BASE, tiny.tokenizer(), **SIZES, mesh="replica=2")
    monkeypatch.setattr(async_engine, "STATS_INTERVAL_S", 0.0)  # figures are of the last step
    halt = Halt(engine, all_replicas_run)
    async with serving(engine, http_port=0) as s:  # pyright: ignore[reportArgumentType]: not the fake one
        info = await s.client.server_info()
        assert (info.mesh_replica, info.mesh_stage, info.mesh_tensor, info.load.num_pages) == (2, 1, 1, 80)
        prompts = tiny.prompts(8, seed=1)

        async def tokens(prompt: list[int]) -> list[int]:
            stream = s.client.generate(token_ids=prompt, temperature=0, max_tokens=40, ignore_eos=True)
            return [token async for chunk in stream for token in chunk.token_ids]

        asked = [asyncio.create_task(tokens(prompt)) for prompt in prompts]
        await halt.reached()
        busy = _running(await asyncio.to_thread(read, f"{s.url}/metrics"))
        assert set(busy) == {"0", "1"} and all(busy.values())
        load = await s.client.get_load()
        assert load.num_running + load.num_waiting > 1
        halt.end()
        halt = Halt(engine, lambda stats: engine.replicas.replica_of("x") is not None)
        endless = s.client.generate(token_ids=prompts[0], request_id="x", temperature=0, ignore_eos=True)
        ends = asyncio.create_task(reasons(endless))
        await halt.reached()
        aborting = asyncio.create_task(s.client.abort("x"))
        async with asyncio.timeout(TIMEOUT_S):
            while not s.server.engine._commands:
                await asyncio.sleep(0.001)
        halt.end()
        await aborting
        assert (await ends)[-1] == "abort"
        assert await asyncio.gather(*asked) == [oracle_greedy(CONFIG, BASE, p, 40) for p in prompts]
        page = await asyncio.to_thread(read, f"{s.url}/engine")
        assert '"num_pages":80' in page
        assert await s.client.drain(30)
        load = await s.client.get_load()
        assert (load.num_running, load.num_waiting, load.num_pages_held) == (0, 0, 0)
        assert load.generation_tokens >= 8 * 40 and load.recompilations_after_ready == 0
        families = {
            f.name: f for f in text_string_to_metric_families(await asyncio.to_thread(read, f"{s.url}/metrics"))
        }
        (sample,) = families["jaxserve:generation_tokens"].samples
        assert sample.value == load.generation_tokens and not sample.labels


def _running(metrics: str) -> dict[str, float]:
    """Requests that run, by replica."""
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    gauge = families.get("jaxserve:num_requests_running")
    return {sample.labels["engine"]: sample.value for sample in gauge.samples} if gauge else {}
