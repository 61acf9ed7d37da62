"""``jaxserve launch`` as two processes: a clean end, and what happens to each when the other one is gone."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.server.client import Client
from tests.checkpoint.tiny_gguf import weights, write
from tests.multihost.conftest import ENVIRONMENT, free_port

START_S = 280.0  # a busy machine compiles slowly
MESH = """platform: cpu
axes: {{stage: 2, tensor: 2}}
processes: 2
devices_per_process: 2
coordinator: 127.0.0.1:{port}
timeouts: {{start_s: 120, heartbeat_s: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the model, and what the first start compiled."""
    folder = tmp_path_factory.mktemp("launch")
    write(folder / "tiny.gguf", keys={"llama.context_length": 8192})
    (folder / "token").write_text("a secret of more than 16 bytes\n")
    return folder


def command(folder: Path, index: int, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "jaxserve", "launch", str(folder / "tiny.gguf"), f"--process-id={index}"),
        *(f"--mesh={folder / 'mesh.yaml'}", f"--token-file={folder / 'token'}", "--grpc-port=0"),
        *("--max-num-seqs=2", "--prefill-sizes=16", "--decode-sizes=2", "--max-model-len=8192", "--num-pages=520"),
        *(f"--compilation-cache-dir={folder / 'compiled'}", f"--port-file={folder / 'port'}", *options),
    ]


@contextmanager
def launched(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str], str]]:
    """Leader, follower and the address, when requests are served."""
    (folder / "port").unlink(missing_ok=True)
    (folder / "mesh.yaml").write_text(MESH.format(port=free_port()))
    started = []
    try:
        for index in (0, 1):
            started.append(
                subprocess.Popen(
                    command(folder, index, *options),
                    env=ENVIRONMENT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        deadline = time.monotonic() + START_S
        while not ((folder / "port").exists() and health(f"127.0.0.1:{(folder / 'port').read_text().strip()}")):
            over = [process for process in started if process.poll() is not None]
            assert not over, [(process.returncode, *process.communicate(timeout=10)) for process in over]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield started[0], started[1], f"127.0.0.1:{(folder / 'port').read_text().strip()}"
    finally:
        for process in started:
            process.kill()
            process.communicate()


def health(server: str) -> bool:
    """Whether it says SERVING."""
    with grpc.insecure_channel(server) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            said = stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except grpc.RpcError:
            return False
        return said.status == health_pb2.HealthCheckResponse.SERVING


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """Exit status and what it said."""
    said, _ = process.communicate(timeout=within_s)
    return process.returncode, said


NUM_CLIENTS = 32  # at once, on the two places of the engine


def one_of_many(client: Client, index: int) -> str:
    """A client of its kind: one that waits for its text, one that leaves, one with a deadline, one that may only get
    digits. Returns the text of a request that ends by itself, of those that sample."""
    prompt = "abc"[: 1 + index % 3]
    asked: dict[str, Any] = {"temperature": 0.8, "seed": index, "ignore_eos": True}
    match index % 4:
        case 0:
            return "".join(chunk.text for chunk in client.generate(prompt, max_tokens=20, **asked))
        case 1:
            stream = client.generate(prompt, max_tokens=4000, **asked)
            next(stream)
            stream.close()
        case 2:
            with pytest.raises(grpc.RpcError) as caught:
                list(client.generate(prompt, max_tokens=8000, timeout_s=0.05 + 0.05 * index, **asked))
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # pyright: ignore[reportAttributeAccessIssue]
        case 3:
            digits = {"regex": "[0-9]{6}"}
            text = "".join(c.text for c in client.generate(prompt, max_tokens=9, seed=index, structured_outputs=digits))
            assert len(text) == 6 and text.isdigit()
            return text
    return ""


def served_other_weights(client: Client, folder: Path, text: str) -> None:
    """All hosts read others and serve them, then the old ones again; a file that does not fit changes nothing."""
    for name, keys, array in (
        ("other", {"llama.context_length": 8192}, {k: v[::-1].copy() for k, v in weights().items()}),
        ("smaller", {"llama.context_length": 8192, "llama.block_count": 1}, weights()),
    ):
        write(folder / f"{name}.gguf", keys=keys, tensors=array)
    client.update_weights(str(folder / "other.gguf"))
    assert one_of_many(client, 0) != text
    client.update_weights(str(folder / "tiny.gguf"))
    with pytest.raises(grpc.RpcError) as caught:
        client.update_weights(str(folder / "smaller.gguf"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # pyright: ignore[reportAttributeAccessIssue]
    assert one_of_many(client, 0) == text


@pytest.mark.timeout(START_S + 120)
def test_both_serve_many_clients_and_end_together(folder: Path):
    with launched(folder, f"--weights-from={folder}") as (leader, follower, server):
        with Client(server) as client:
            alone = [one_of_many(client, i) if i % 4 in (0, 3) else "" for i in range(NUM_CLIENTS)]
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                together = list(pool.map(lambda i: one_of_many(client, i), range(NUM_CLIENTS)))
            assert together == alone and len(set(together)) > NUM_CLIENTS // 3
            deadline = time.monotonic() + 30
            while (load := client.get_load()).num_running + load.num_waiting and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (load.num_running, load.num_waiting, load.recompilations_after_ready) == (0, 0, 0)
            assert load.num_pages_held == 0
            served_other_weights(client, folder, alone[0])
        for process in (follower, leader):  # as launchers do
            process.send_signal(signal.SIGTERM)
        assert ended(leader, 60)[0] == 0
        assert ended(follower, 60)[0] == 0


@pytest.mark.timeout(START_S + 60)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follower_that_has_gone_ends_all(folder: Path, number: signal.Signals):
    with launched(folder) as (leader, follower, server), Client(server) as client:
        stream = client.generate("abc", max_tokens=8000, ignore_eos=True)
        next(stream)
        follower.send_signal(number)
        since = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
        assert not health(server)
        status, said = ended(leader, 10)
        assert time.monotonic() - since < 10
        assert status == 1 and "process 1 (" in said and " is lost: " in said, said


@pytest.mark.timeout(START_S + 60)
def test_a_leader_that_has_gone_ends_the_others(folder: Path):
    with launched(folder) as (leader, follower, _):
        leader.kill()
        status, said = ended(follower, 10)
        assert status != 0, said  # by our own hand, or by that of JAX's service, whichever notices first


@pytest.mark.timeout(100)
def test_hosts_that_differ_are_refused(folder: Path):
    (folder / "mesh.yaml").write_text(MESH.format(port=free_port()))
    commands = [command(folder, 0), command(folder, 1, "--page-size=32")]
    started = [
        subprocess.Popen(c, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for c in commands
    ]
    for process in started:
        status, said = ended(process, 90)
        assert status == 2
        assert "has page_size=32, process 0 has page_size=None" in said
