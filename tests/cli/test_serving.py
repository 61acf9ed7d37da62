"""``jaxserve serve`` as a process: start, signals, end."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.cli.app import run
from jaxserve.server.client import Client

REFERENCE = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"  # of tests/real_model
START_S = 150.0  # a busy machine compiles slowly


def started(process: subprocess.Popen[str], port_file: Path) -> str:
    """The address of a server, once it has bound it."""
    deadline = time.monotonic() + START_S
    while not port_file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return f"127.0.0.1:{port_file.read_text().strip()}"


def stopped(process: subprocess.Popen[str]) -> str:
    """Asserts a clean end and returns stderr; stdout must be empty."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in err
    return err


@pytest.mark.slow
@pytest.mark.timeout(2 * START_S)
def test_default_model_from_start_to_end(spawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    port_file = tmp_path / "port"
    arguments = ["--max-num-seqs=1", "--prefill-sizes=64", "--max-model-len=512", "--metrics-port=0"]
    command = ("serve", DEFAULT_MODEL, "--grpc-port=0", f"--port-file={port_file}", *arguments)
    process = spawn(*command, as_users_do=True)
    server = started(process, port_file)
    assert run(["client", "health", "--server", server, "--wait", str(START_S)]) == 0
    assert capsys.readouterr().out == "READY\n"

    question = ["-p", "What is the capital of France?", "--temperature=0", "--max-tokens=16"]
    assert run(["client", "chat", "--server", server, *question, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert "Paris" in out and "TTFT" in err
    assert run(["client", "chat", "--server", server, *question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == out
    prompt = json.loads(REFERENCE.read_text())["prompts"][0]
    exactly = ["--temperature=0", "--ignore-eos", f"--max-tokens={len(prompt['new_token_ids'])}", "--json"]
    assert run(["client", "generate", "--server", server, "-p", prompt["text"], *exactly]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == prompt["new_token_ids"]
    deadline = time.monotonic() + 10.0  # figures are as old as a tenth of a second
    while True:
        assert run(["client", "info", "--server", server, "--json"]) == 0
        load = json.loads(capsys.readouterr().out)["server"]["load"]
        if load["num_pages_held"] == 0:
            break
        assert time.monotonic() < deadline, load
    assert int(load["generation_tokens"]) > 0 and int(load["recompilations_after_ready"]) == 0

    assert run(["serve", DEFAULT_MODEL, f"--grpc-port={server.rpartition(':')[2]}"]) == 1
    assert "in use" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    err = stopped(process)
    assert f"listening on {server}, metrics on 127.0.0.1:" in err and f"ready on {server}" in err
    assert not port_file.exists()


@pytest.mark.timeout(2 * START_S)
def test_running_request_finishes_after_interrupt(spawn, tiny: list[str], tmp_path: Path):
    port_file = tmp_path / "port"
    process = spawn("serve", *tiny, "--grpc-port=0", f"--port-file={port_file}")
    server = started(process, port_file)
    assert run(["client", "health", "--server", server, "--wait", str(START_S)]) == 0
    options = ["--ignore-eos", "--max-tokens=1500", "--json"]
    client = spawn("client", "generate", "-p", "hello", "--server", server, "--request-id=long", *options)
    deadline = time.monotonic() + START_S
    with Client(server) as observer:
        while observer.server_info().load.num_running == 0:
            assert client.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    assert len(json.loads(out)["token_ids"]) == 1500
    stopped(process)


def test_stop_while_loading(spawn, tmp_path: Path):
    port_file = tmp_path / "port"
    process = spawn("serve", DEFAULT_MODEL, "--grpc-port=0", f"--port-file={port_file}")
    while not re.search(r"load (\d+)/\1\b", line := process.stderr.readline()):
        assert line, "the server ended"
    process.send_signal(signal.SIGTERM)
    stopped(process)
    assert not port_file.exists()


def test_engine_that_cannot_be_built(spawn, tiny: list[str]):
    process = spawn("serve", *tiny, "--grpc-port=0", "--num-pages=3")
    out, err = process.communicate(timeout=START_S)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: num_pages=3 ") and "Traceback" not in err
