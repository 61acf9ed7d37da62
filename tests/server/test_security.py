"""Tokens and TLS, for gRPC and HTTP."""

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import websockets.asyncio.client as ws
from websockets.exceptions import InvalidStatus

from jaxserve.server.app import Server
from jaxserve.server.channels import TLS
from jaxserve.server.client import AsyncClient, Client, batch_request
from jaxserve.server.client_codec import Chunk
from jaxserve.server.options import ServerOptions
from jaxserve.server.security import ApiKeys, is_loopback, warn_if_open
from tests.server.conftest import TIMEOUT_S, Serving, serving
from tests.server.fake_engine import FakeEngine, expected_text
from tests.server.test_service import refused, text_of

PEM = Path(__file__).resolve().parents[1] / "data" / "tls"
TLS_SERVER: dict[str, Any] = {"tls_cert": PEM / "server.pem", "tls_key": PEM / "server.key"}
KEY, OTHER = "first-secret-key", "second-secret-key"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# two clients\n{KEY}\n\n  {OTHER}  \n")
    return path


def test_keys():
    keys = ApiKeys([KEY, OTHER])
    for good in (f"Bearer {KEY}", f"bearer {OTHER}", f"Bearer  {KEY} ".encode()):
        assert keys.accept(good)
    for bad in (
        None,
        b"",
        KEY,
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer é",
    ):
        assert not keys.accept(bad)
    assert KEY not in repr(vars(keys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has 0 keys"),
        (b"# nothing\n", "has 0 keys"),
        (b"long-enough-key\nshort\n", "line 2 is no key .* it has 5"),
        (b"key with spaces", "line 1"),
        ("schlüssel-lang".encode(), "line 1"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "No such file"),
    ],
)
async def test_bad_files_of_keys_are_one_error_before_anything_is_loaded(
    text: bytes | None, message: str, tmp_path: Path
):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text)
    built = []
    with pytest.raises(ValueError, match=f"^api_keys_file={path}: .*{message}") as error:
        await Server(lambda: built.append(1) or FakeEngine(), ServerOptions(port=0, api_keys_file=path)).start()
    assert built == [] and "spaces" not in str(error.value).partition("without")[0]


async def test_http_needs_a_token_everywhere_but_for_health(keys_file: Path):
    async with serving(http_port=0, api_keys_file=keys_file) as s:
        async with httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S) as client:
            paths = (await client.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"})).json()["paths"]
            assert "/v1/chat/completions" in paths and "/metrics" in paths
            for path in (*paths, "/openapi.json", "/nothing"):
                expected = 200 if path in ("/health", "/ready", "/") else 401
                for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}):
                    for method in ("GET", "POST"):
                        answer = await client.request(method, path, headers=headers, json={"prompt": "a"})
                        if method == "GET" or expected == 401:
                            assert answer.status_code == expected, path
                        if expected == 401:
                            assert answer.json()["error"]["code"] == "invalid_api_key"
                            assert answer.headers["www-authenticate"] == "Bearer"
            for key in (KEY, OTHER):
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "abc", "max_tokens": 3}
                answer = await client.post("/v1/completions", json=body, headers=headers)
                assert answer.json()["choices"][0]["text"] == expected_text("abc", 3)
        assert len(s.engine.requests) == 2


async def test_websocket_tokens_and_origins(keys_file: Path):
    url = "/generate/ws"
    async with serving(http_port=0, api_keys_file=keys_file) as s:
        address = s.url.replace("http", "ws") + url
        wrong: list[Any] = [None, ["jaxserve.bearer", "wrong-key-123"], [KEY]]
        for subprotocols in wrong:
            with pytest.raises(InvalidStatus) as caught:
                await ws.connect(address, subprotocols=subprotocols)
            assert caught.value.response.status_code == 403
        async with ws.connect(address, additional_headers={"authorization": f"Bearer {KEY}"}):
            pass
        named: Any = ["jaxserve.bearer", KEY]
        async with ws.connect(address, subprotocols=named) as connection:  # as a browser can
            assert connection.subprotocol == "jaxserve.bearer"
    async with serving(http_port=0) as s:
        address = s.url.replace("http", "ws") + url
        async with ws.connect(address, origin=s.url):  # pyright: ignore[reportArgumentType]
            pass
        with pytest.raises(InvalidStatus):
            await ws.connect(address, origin="https://elsewhere.example")  # pyright: ignore[reportArgumentType]


async def test_grpc_needs_a_token_everywhere_but_for_health(keys_file: Path):
    async with serving(api_keys_file=keys_file) as s:
        await s.client.wait_ready(TIMEOUT_S)  # health
        for api_key in (None, "wrong-key-123"):
            async with AsyncClient(s.target, api_key=api_key) as client:
                for call in (
                    client.generate("a"),
                    client.tokenize("a"),
                    client.detokenize([97]),
                    client.model_info(),
                    client.server_info(),
                    client.abort("x"),
                    client.embed("a"),
                    client.generate_batch([batch_request("x", "a")]),
                    client.get_load(),
                    client.drain(),
                    client.update_weights("x"),
                ):
                    assert (await refused(call)).code() == grpc.StatusCode.UNAUTHENTICATED
        for api_key in (KEY, OTHER):
            async with AsyncClient(s.target, api_key=api_key) as client:
                assert await text_of(client.generate("abc", max_tokens=3)) == expected_text("abc", 3)
                assert (await client.model_info()).model_name == "fake"
                chunks = [c async for c in client.generate_batch([batch_request("x", "abc", max_tokens=3)])]
                assert all(isinstance(c, Chunk) for c in chunks) and chunks


async def with_client(s: Serving, **options: Any) -> str:
    """A blocking client's answer."""

    def ask() -> str:
        with Client(f"localhost:{s.server.port}", **options) as client:
            client.wait_ready(5)
            return "".join(chunk.text for chunk in client.generate("abc", max_tokens=3))

    return await asyncio.to_thread(ask)


async def test_tls(keys_file: Path):
    async with serving(http_port=0, metrics_port=0, **TLS_SERVER) as s:
        assert await with_client(s, tls=TLS(ca=PEM / "ca.pem")) == expected_text("abc", 3)
        context = ssl.create_default_context(cafile=PEM / "ca.pem")
        async with httpx2.AsyncClient(verify=context) as client:
            for port, path in ((s.server.http_port, "/v1/models"), (s.server.metrics_port, "/metrics")):
                assert (await client.get(f"https://localhost:{port}{path}")).status_code == 200
                with pytest.raises(httpx2.TransportError):
                    await client.get(f"http://localhost:{port}{path}")
        async with httpx2.AsyncClient() as client:
            with pytest.raises(httpx2.ConnectError):  # who signed it is not known
                await client.get(f"https://localhost:{s.server.http_port}/health")
    async with serving(api_keys_file=keys_file, **TLS_SERVER) as s:
        assert await with_client(s, tls=TLS(ca=PEM / "ca.pem"), api_key=KEY) == expected_text("abc", 3)


async def test_client_certificates():
    mutual: dict[str, Any] = TLS_SERVER | {"tls_client_ca": PEM / "ca.pem"}
    async with serving(http_port=0, **mutual) as s:
        own = TLS(ca=PEM / "ca.pem", cert=PEM / "client.pem", key=PEM / "client.key")
        assert await with_client(s, tls=own) == expected_text("abc", 3)
        async with AsyncClient(f"localhost:{s.server.port}", tls=TLS(ca=PEM / "ca.pem")) as client:
            assert (await refused(client.model_info())).code() == grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=PEM / "ca.pem")
        async with httpx2.AsyncClient(verify=context) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get(f"https://localhost:{s.server.http_port}/health")
        context.load_cert_chain(PEM / "client.pem", PEM / "client.key")
        async with httpx2.AsyncClient(verify=context) as client:
            assert (await client.get(f"https://localhost:{s.server.http_port}/health")).status_code == 200


@pytest.mark.parametrize(
    "changed",
    [{"tls_cert": PEM / "nothing"}, {"tls_key": PEM / "client.key"}, {"tls_client_ca": PEM / "README.md"}],
)
async def test_bad_tls_files_are_one_error(changed: dict):
    (name, path) = next(iter(changed.items()))
    with pytest.raises(ValueError, match=f"{name}={path}"):
        await Server(FakeEngine, ServerOptions(port=0, **(TLS_SERVER | changed))).start()


def test_a_wide_bind_warns(caplog: pytest.LogCaptureFixture, keys_file: Path):
    def warned(**options) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_if_open(ServerOptions(**options))
        return [record.message for record in caplog.records]

    assert warned(host="127.0.0.1") == warned(host="localhost") == warned(host="::1") == []
    anyone, clear = warned(host="0.0.0.0")
    assert "ANYONE" in anyone and "texts travel in the clear" in clear
    (clear,) = warned(host="::", api_keys_file=keys_file)
    assert "tokens and texts travel in the clear" in clear
    assert warned(host="::", api_keys_file=keys_file, **TLS_SERVER) == []
    assert warned(host="::", tls_client_ca=PEM / "ca.pem", **TLS_SERVER) == []
    assert not is_loopback("example.org")
