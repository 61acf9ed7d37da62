"""The real server over a golden model: adapters that peft made, loaded while a request streams, over both wires."""

import asyncio
import json

import httpx2

from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.options import ServerOptions
from tests.families.golden import engine
from tests.lora import golden
from tests.server.conftest import TIMEOUT_S


async def test_loaded_while_another_streams():
    everywhere, some = golden.load("llama_all"), golden.load("llama_some")
    options = ServerOptions(port=0, http_port=0, lora_folders=(golden.FOLDER,))
    server = Server(
        lambda: engine(everywhere, lora_modules={"all": everywhere.adapter}, max_loras=2, max_lora_rank=4), options
    )
    await server.start()
    try:
        async with (
            AsyncClient(f"127.0.0.1:{server.port}") as client,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", timeout=TIMEOUT_S) as http,
        ):
            await server.ready()
            stream = client.generate(
                token_ids=everywhere.prompt, lora="all", temperature=0, max_tokens=24, ignore_eos=True
            )
            tokens = list((await anext(stream)).token_ids)
            path = str(some.adapter)
            loaded = await http.post("/v1/load_lora_adapter", json={"lora_name": "some", "lora_path": path})
            assert loaded.json() == {"lora_name": "some", "lora_path": path, "rank": 3}
            asked = {"model": "some", "prompt": some.prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
            other = asyncio.create_task(http.post("/generate/stream", json=asked))
            tokens += [token async for chunk in stream for token in chunk.token_ids]
            assert tokens[: len(everywhere.tokens)] == everywhere.tokens and len(tokens) == 24
            events = [line.removeprefix("data: ") for line in (await other).text.split("\n\n")]
            found = [token for event in events if event.startswith("{") for token in json.loads(event)["token_ids"]]
            assert found == some.tokens
            await client.unload_lora("all")
            assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["llama", "some"]
            refused = await http.post("/v1/completions", json=asked | {"model": "all"})
            assert refused.status_code == 404
            assert (await client.get_load()).recompilations_after_ready == 0
    finally:
        assert await server.close()
