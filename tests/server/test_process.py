"""A server in a process of its own: signals and exit codes."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from jaxserve.server.app import SWITCH_INTERVAL_S
from jaxserve.server.client import Client
from tests.server.conftest import TIMEOUT_S
from tests.server.fake_engine import expected_text

EXIT_S = 5.0  # from the limit to the end of the process; a tenth of it on a machine with nothing else to do
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(*args: str, wait_ready: bool = True):
    """The running process and, if it gets that far, its port. Killed at the end if it is still there."""
    command = [sys.executable, "-m", "tests.server.serve_fake", *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            first = server.stdout.readline().split()
            port = int(first[1]) if first else None
            if wait_ready:
                assert server.stdout.readline() == "ready\n"
            yield server, port
        finally:
            server.kill()


def end_of(server: subprocess.Popen) -> tuple[int, str]:
    """Exit status and standard error."""
    _, errors = server.communicate(timeout=TIMEOUT_S)
    return server.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number):
    with process() as (server, port), Client(f"127.0.0.1:{port}") as client:
        stream = client.generate("a", max_tokens=300)
        text = next(stream).text
        server.send_signal(number)
        assert text + "".join(chunk.text for chunk in stream) == expected_text("a", 300)
        assert end_of(server) == (0, "")


def test_what_the_process_sets_of_the_interpreter():
    """A token must not wait for the engine's thread, which has the interpreter until the next step is on its way, nor
    for a collector that goes through all that was traced."""
    with process() as (server, _):
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=TIMEOUT_S)
        assert out == f"switch interval {SWITCH_INTERVAL_S:g} s\ncollected: what is new\n"
        assert SWITCH_INTERVAL_S < 0.001


def test_drain_timeout_aborts_and_exits_0():
    with process("--drain-timeout", "0.1") as (server, port), Client(f"127.0.0.1:{port}") as client:
        stream = client.generate("a")
        next(stream)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
        status, errors = end_of(server)
        assert status == 0 and "0.1 s passed" in errors


def test_a_second_signal_exits_at_once():
    with process("--drain-timeout", "1000") as (server, port), Client(f"127.0.0.1:{port}") as client:
        stream = client.generate("a")
        next(stream)
        server.send_signal(signal.SIGTERM)
        while True:  # until the drain has begun: signals of one kind that come together are one
            try:
                next(client.generate("b", max_tokens=1))
            except grpc.RpcError:
                break
        server.send_signal(signal.SIGTERM)
        assert end_of(server) == (128 + signal.SIGTERM, "")


def test_a_signal_while_loading_exits_0():
    with process("--load", "forever", wait_ready=False) as (server, _):
        server.send_signal(signal.SIGTERM)
        assert end_of(server) == (0, "")


def test_a_failed_load_is_one_line():
    with process("--load", "badly", wait_ready=False) as (server, _):
        assert end_of(server) == (1, "error: no such model\n")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("--fail-at-step", "3"), "RuntimeError: the device was lost"),
        (("--hang-at-step", "3", "--step-timeout", "0.5"), "StepTimeoutError: a step took longer than 0.5 s"),
    ],
)
def test_a_device_that_fails_or_hangs_ends_requests_and_process(fault, message):
    with process(*fault) as (server, port), Client(f"127.0.0.1:{port}") as client:
        started = time.monotonic()
        chunks = []
        with pytest.raises(grpc.RpcError, match=message) as caught:
            for chunk in client.generate("a"):
                chunks.append(chunk)
        assert "".join(chunk.text for chunk in chunks) == expected_text("a", 3)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
        status, errors = end_of(server)
        assert status == 1 and errors.endswith(f"error: the engine failed: {message}\n")
        assert time.monotonic() - started < 0.5 + EXIT_S


def test_a_port_in_use_is_one_line(taken_port):
    for option in ("--port", "--metrics-port"):
        with process(option, str(taken_port), wait_ready=False) as (server, port):
            assert port is None
            assert end_of(server) == (1, f"error: cannot listen on 127.0.0.1:{taken_port}: it is in use\n")
