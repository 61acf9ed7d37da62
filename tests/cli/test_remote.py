"""The client's commands against a server whose answers are known by arithmetic."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import grpc
import pytest

from jaxserve.cli.app import run
from jaxserve.server.client import Client
from tests.cli.conftest import ENVIRONMENT
from tests.server.fake_engine import expected_text

TIMEOUT_S = 30.0


@pytest.fixture
def client(fake_server: str, capsys: pytest.CaptureFixture[str]):
    """Runs ``jaxserve client ARGUMENTS``; returns status, stdout, stderr."""

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        status = run(["client", command, "--server", fake_server, *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_generate_streams_with_stats(client):
    status, out, err = client("generate", "-p", "once", "--max-tokens", "20", "--stats")
    assert (status, out) == (0, expected_text("once", 20) + "\n")
    assert re.fullmatch(r"TTFT \d+\.\d+ s, \d+\.\d tokens/s, 20 tokens \(prompt 4\)\n", err)


def test_generate_json(client):
    _, out, _ = client("generate", "-p", "once", "--max-tokens", "3", "--json", "--logprobs", "1", "--request-id", "r7")
    values = json.loads(out)
    assert values["text"] == expected_text("once", 3) and values["request_id"] == "r7"
    assert len(values["token_ids"]) == len(values["logprobs"]) == 3 and values["finish_reason"] == "length"
    assert values["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 1}


def test_several_choices(client):
    arguments = ("generate", "-p", "once", "--max-tokens", "3", "--n", "2")
    texts = [expected_text("once", 3 + k)[k:] for k in range(2)]
    assert client(*arguments) == (0, f"{texts[0]}\n\n{texts[1]}\n", "")
    values = [json.loads(line) for line in client(*arguments, "--json")[1].splitlines()]
    assert [(v["choice"], v["text"], len(v["token_ids"])) for v in values] == [(0, texts[0], 3), (1, texts[1], 3)]
    status, _, err = client("chat", "-p", "hi", "--n", "2")
    assert status == 2 and "n: 2 answers, a conversation takes 1" in err


def test_chat_uses_the_template(client):
    _, out, _ = client("chat", "-p", "hi", "--system", "be kind", "--max-tokens", "5")
    assert out == expected_text("system:be kind;user:hi;", 5) + "\n"


def test_refusals_are_bad_input(client):
    status, out, err = client("generate", "-p", "once", "--top-p", "2")
    assert (status, out) == (2, "") and err.startswith("error: INVALID_ARGUMENT: top_p: 2.0")
    status, _, err = client("abort", "nobody")
    assert status == 2 and err.startswith("error: NOT_FOUND: ")


def test_timeout_ends_the_stream(client):
    status, out, err = client("generate", "-p", "once", "--timeout", "0.3")
    assert status == 1 and expected_text("once", 1999).startswith(out) and "DEADLINE_EXCEEDED" in err


def test_an_aborted_answer_is_no_whole_one(client, fake_server: str):
    def abort() -> None:
        with Client(fake_server) as other:
            while True:  # until it is known
                with contextlib.suppress(grpc.RpcError):
                    return other.abort("ended")

    for options in ((), ("--json",)):
        thread = threading.Thread(target=abort)
        thread.start()
        status, out, err = client("generate", "-p", "once", "--request-id", "ended", *options)
        thread.join()
        assert (status, err) == (1, "error: the request was aborted\n")
        assert json.loads(out)["finish_reason"] == "abort" if options else out.endswith("\n")


def test_tokenize_health_info(client):
    assert client("tokenize", "ab") == (0, "97 98\n", "")
    assert json.loads(client("tokenize", "a", "--chat", "--json")[1]) == list(b"user:a;")
    assert client("health") == (0, "READY\n", "")
    assert client("health", "--wait", "5") == (0, "READY\n", "")
    info = json.loads(client("info", "--json")[1])
    assert info["model"]["model_name"] == "fake" and info["server"]["load"]["num_pages"] == 100
    assert re.search(r"^max_model_len +2000$", client("info")[1], re.MULTILINE)


class Terminal:
    """A command with a terminal of its own, for what depends on one: prompts, Ctrl-C from the keyboard."""

    def __init__(self, *arguments: str):
        self._fd, inside = pty.openpty()
        take_it = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # Ctrl-C then comes from it
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{take_it}; runpy.run_module('jaxserve', run_name='__main__')", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env=ENVIRONMENT | {"TERM": "dumb"},
        )
        os.close(inside)
        self.seen = ""

    def read_until(self, pattern: str) -> None:
        """Reads on until ``pattern`` is found in what was not matched before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} not seen in {self.seen!r}"
            self.seen += self._read()
        self.seen = self.seen[match.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _read(self) -> str:
        try:
            return os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # how a terminal tells that its last writer has gone
            raise AssertionError(f"the command ended; unmatched: {self.seen!r}") from None

    def interrupt_until_end(self) -> int:
        """Presses Ctrl-C, again where it was missed: readline does not see one between its prompt and its wait for a
        key. Returns the exit status; what was still printed is in ``seen``."""
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while True:
                self.type("\x03")
                while select.select([self._fd], [], [], 1.0)[0]:
                    self.seen += os.read(self._fd, 65536).decode(errors="replace")
                assert time.monotonic() < deadline, f"still running; unmatched: {self.seen!r}"
        except OSError:  # the terminal has no other end any more
            return self._process.wait(TIMEOUT_S)
        finally:
            self._process.kill()
            os.close(self._fd)


def test_dialogue_on_a_terminal(fake_server: str):
    """Ctrl-C stops an answer and not the dialogue; at the prompt it leaves."""
    terminal = Terminal("client", "chat", "--server", fake_server)
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until(re.escape(expected_text("user:hello;", 5)))
    terminal.type("\x03")
    terminal.read_until(r"\[stopped\]")
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("> ")
    assert terminal.interrupt_until_end() == 130
    assert "Traceback" not in terminal.seen


def test_interrupt_ends_the_request(fake_server: str, spawn):
    process = spawn("client", "generate", "-p", "endless", "--request-id", "interrupted", "--server", fake_server)
    assert process.stdout.read(3) == expected_text("endless", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, "")
    deadline = time.monotonic() + TIMEOUT_S
    while run(["client", "abort", "interrupted", "--server", fake_server]) == 0:  # until it is unknown, status 2
        assert time.monotonic() < deadline


def test_files_of_token_and_tls(client, tmp_path):
    key = tmp_path / "key"
    key.write_text("a-token-nobody-asks-for\n")
    assert client("tokenize", "ab", "--api-key-file", str(key)) == (0, "97 98\n", "")
    status, _, err = client("tokenize", "ab", "--api-key-file", str(tmp_path / "none"))
    assert status == 1 and str(tmp_path / "none") in err
    status, _, err = client("tokenize", "ab", "--tls")  # of a server without
    assert status == 1 and "UNAVAILABLE" in err
