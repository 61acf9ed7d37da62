"""Adapters over both wires, before the fake engine: loaded from allowed folders, listed, named, unloaded."""

import asyncio

import grpc
import pytest

from tests.server.conftest import endless_engine
from tests.server.http.conftest import web
from tests.server.test_control import refused

Code = grpc.StatusCode


@pytest.fixture
def folder(tmp_path):
    """An allowed folder with two adapters, a link out of it, and one beside it."""
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for place in (allowed, other):
        place.mkdir()
        (place / "a").write_text("4")
    (allowed / "b").write_text("8")
    (allowed / "link").symlink_to(other / "a")
    return allowed


async def test_what_one_wire_loads_the_other_serves(folder):
    async with web(lora_folders=(folder,)) as site:
        client = site.served.client
        loaded = await client.load_lora("a", str(folder / "a"))
        assert (loaded.lora_name, loaded.lora_path, loaded.rank) == ("a", str(folder / "a"), 4)
        answer = await site.post("/v1/load_lora_adapter", lora_name="b/2", lora_path=str(folder / "b"))
        assert answer == {"lora_name": "b/2", "lora_path": str(folder / "b"), "rank": 8}
        assert [(lora.lora_name, lora.rank) for lora in await client.list_loras()] == [("a", 4), ("b/2", 8)]
        cards = (await site.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
            ("fake", "fake", None), ("a", str(folder / "a"), "fake"), ("b/2", str(folder / "b"), "fake"),
        ]  # fmt: skip
        assert (await site.client.get("/v1/models/b/2")).json() == cards[2]
        info = await client.server_info()
        assert (info.max_loras, info.max_lora_rank) == (2, 8)

        asked = {"max_tokens": 2, "prompt": "abc"}
        answer = await site.post("/v1/completions", model="a", **asked)
        assert answer["model"] == "a"
        messages = [{"role": "user", "content": "x"}]
        await site.post("/v1/chat/completions", model="b/2", messages=messages, max_tokens=2)
        await site.post("/v1/embeddings", model="a", input="abc")
        await site.stream("/generate/stream", model="b/2", **asked)
        await site.post("/tokenize", model="a", prompt="abc")
        await site.post("/v1/completions", model="fake", **asked)
        await site.post("/v1/completions", **asked)
        assert [chunk async for chunk in client.generate("abc", max_tokens=2, lora="a")]
        await client.embed("abc", lora="b/2")
        adapters = [request.adapter and request.adapter.name for request in site.engine.requests]
        assert adapters == ["a", "b/2", "a", "b/2", None, None, "a", "b/2"]

        await client.unload_lora("b/2")
        assert await site.post("/v1/unload_lora_adapter", lora_name="a") == {"lora_name": "a"}
        assert await client.list_loras() == []


async def test_refusals(folder):
    async with web(lora_folders=(folder,), served_model_names=("m", "n")) as site:
        client = site.served.client
        await client.load_lora("a", str(folder / "a"))
        for path in (folder.parent / "other" / "a", folder / "link", folder / ".." / "other" / "a", "/", ""):
            error = await refused(client.load_lora("x", str(path)))
            assert error.code() == Code.PERMISSION_DENIED, path
            status, told = await site.refused("/v1/load_lora_adapter", lora_name="x", lora_path=str(path))
            assert (status, told["code"], told["param"]) == (403, "not_allowed", "lora_path"), path
        for name, path, field, message in (
            ("x", "missing", "lora_path", "no adapter is there"),
            ("x", "a\0b", "lora_path", "null"),
            ("a", "b", "lora_name", "'a' is loaded already"),
            ("n", "b", "lora_name", "'n' is a name of the base model"),
        ):
            error = await refused(client.load_lora(name, str(folder / path)))
            assert error.code() == Code.INVALID_ARGUMENT and message in (error.details() or ""), name
            assert dict(error.trailing_metadata() or ())["jaxserve-field"] == field
            status, told = await site.refused("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder / path))
            assert (status, told["param"]) == (400, field) and message in told["message"]
        status, told = await site.refused("/v1/load_lora_adapter", lora_name="x", lora_path="y", load_inplace=True)
        assert (status, told["message"]) == (400, "load_inplace: unknown field")

        error = await refused(client.unload_lora("x"))
        assert (error.code(), error.details()) == (Code.NOT_FOUND, "lora_name: 'x' is not loaded")
        status, told = await site.refused("/v1/unload_lora_adapter", lora_name="x")
        assert (status, told["param"]) == (404, "lora_name")
        error = await refused(anext(client.generate("abc", lora="x")))
        assert (error.code(), error.details()) == (Code.NOT_FOUND, "lora: 'x' is not loaded")
        error = await refused(client.embed("abc", lora="x"))
        assert error.code() == Code.NOT_FOUND and dict(error.trailing_metadata() or ())["jaxserve-field"] == "lora"
        status, told = await site.refused("/v1/completions", model="x", prompt="abc")
        assert (status, told["code"], told["param"]) == (404, "model_not_found", "model")
        assert told["message"] == "model: 'x' is not served here, m, n, a is"
        assert (await site.client.get("/v1/models/x")).status_code == 404
    async with web() as site:
        error = await refused(site.served.client.load_lora("a", str(folder / "a")))
        assert error.code() == Code.PERMISSION_DENIED


async def test_an_adapter_that_goes_between_check_and_request_is_not_the_base_model(folder, monkeypatch):
    async with web(lora_folders=(folder,)) as site:
        await site.served.client.load_lora("a", str(folder / "a"))
        make_request = site.engine.make_request

        def unloaded_first(*arguments, **fields):
            site.engine.loras = {}
            return make_request(*arguments, **fields)

        monkeypatch.setattr(site.engine, "make_request", unloaded_first)
        status, told = await site.refused("/v1/completions", model="a", prompt="abc")
        assert (status, told["param"], told["message"]) == (404, "model", "model: 'a' is not loaded")


async def test_metrics_tell_who_is_used(folder):
    async with web(endless_engine(), lora_folders=(folder,)) as site:
        for name in "ab":
            await site.served.client.load_lora(name, str(folder / name))
        stream = site.served.client.generate("abc", lora="b")
        await anext(stream)
        while not (await site.served.client.get_load()).num_running:  # a tenth of a second old at most
            await asyncio.sleep(0.01)
        text = (await site.client.get("/metrics")).text
        await stream.aclose()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if "lora" in line and not line.startswith("#"))
    (info,) = [name for name in lines if name.startswith("jaxserve:lora_requests_info")]
    assert info.endswith('{max_lora="2",running_lora_adapters="b",waiting_lora_adapters=""}')
    assert lines['jaxserve:num_lora_requests_running{lora_name="a"}'] == "0.0"
    assert lines['jaxserve:num_lora_requests_running{lora_name="b"}'] == "1.0"
    assert lines['jaxserve:num_lora_requests_waiting{lora_name="b"}'] == "0.0"
