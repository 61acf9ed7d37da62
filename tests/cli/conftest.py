import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.server.app import Server
from jaxserve.server.options import ServerOptions
from tests.checkpoint.tiny_gguf import write
from tests.server.fake_engine import FakeEngine, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
OF_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # tests/conftest.py sets them


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny model and keep its engine small; what one process compiled, the next one reads."""
    folder = tmp_path_factory.mktemp("tiny")
    write(folder / "tiny.gguf", keys={"llama.context_length": 8192, "tokenizer.chat_template": CHAT_TEMPLATE})
    return [
        str(folder / "tiny.gguf"),
        "--max-num-seqs=1",
        "--prefill-sizes=32",
        "--max-model-len=4096",
        f"--compilation-cache-dir={folder / 'compiled'}",
    ]


@pytest.fixture(scope="module", autouse=True)
def restored_compilation_cache() -> Iterator[None]:
    """Commands that run in this process set JAX's cache: the tests of others must not read what these compiled."""
    names = [name for name in jax.config.values if "cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # the setting alone does not close what it opened


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``jaxserve ARGUMENTS`` in a process of its own, which does not outlive the test. ``as_users_do``: what it
    compiles is compiled in full."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, as_users_do: bool = False) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", *arguments],
            cwd=tmp_path,
            env={k: v for k, v in ENVIRONMENT.items() if not (as_users_do and k in OF_TESTS)},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def fake_server() -> Iterator[str]:
    """The address of a server, in a thread, before an engine whose answers are known by arithmetic."""
    engine = FakeEngine(tokenizer=byte_tokenizer(), max_model_len=2000, step_delay_s=0.005)
    bound, stop = threading.Event(), asyncio.Event()
    server = Server(lambda: engine, ServerOptions(port=0))
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        await server.start()
        await server.ready()
        bound.set()
        await stop.wait()
        assert await server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert bound.wait(30)
    yield f"127.0.0.1:{server.port}"
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    assert not thread.is_alive()
    loop.close()
