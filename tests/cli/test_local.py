"""generate and chat on this machine, with a tiny model's real engine."""

import dataclasses
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from jaxserve.checkpoint import GGUFCheckpoint, checkpoint_info
from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.cli.app import run
from jaxserve.engine.engine import Engine
from jaxserve.sampling_params import SamplingParams

GREEDY = ["--max-tokens=12", "--temperature=0", "--ignore-eos"]


@pytest.fixture(scope="module")
def continuation(tiny: list[str]) -> Iterator[Callable[[str], str]]:
    """The text of twelve greedy tokens after a prompt, from the library."""
    path, *options = tiny
    values = dict(option.removeprefix("--").split("=") for option in options)
    with Engine.from_pretrained(
        path,
        max_num_seqs=int(values["max-num-seqs"]),
        prefill_sizes=[int(values["prefill-sizes"])],
        max_model_len=int(values["max-model-len"]),
        compilation_cache_dir=values["compilation-cache-dir"],
    ) as engine:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        yield lambda prompt: engine.generate([prompt], params)[0].text


def test_one_prompt_is_streamed(tiny: list[str], continuation, capsys: pytest.CaptureFixture[str]):
    assert run(["generate", *tiny, "-p", "hello", *GREEDY, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == continuation("hello") + "\n"
    assert "compile" in err and "TTFT" in err and "12 tokens (prompt 5)" in err


def test_json_lines(tiny: list[str], continuation, capsys: pytest.CaptureFixture[str]):
    assert run(["generate", *tiny, "-p", "hello", "-p", "there", *GREEDY, "--json", "--logprobs=2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("hello", "there")
    assert first["text"] == continuation("hello") and first["finish_reason"] == "length"
    assert len(second["token_ids"]) == len(second["logprobs"]) == 12 and len(second["logprobs"][0]["top"]) == 2


def test_several_prompts_as_text(tiny: list[str], continuation, capsys: pytest.CaptureFixture[str]):
    assert run(["generate", *tiny, "-p", "hello", "-p", "there", *GREEDY]) == 0
    assert capsys.readouterr().out == f"{continuation('hello')}\n\n{continuation('there')}\n"


def test_several_choices(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    asked = ["--n=2", "--seed=3", "--max-tokens=5", "--ignore-eos", "--allowed-token-id=3", "--allowed-token-id=4"]
    assert run(["generate", *tiny, "-p", "hello", "-p", "there", *asked, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(v["prompt"], v["choice"]) for v in lines] == [("hello", 0), ("hello", 1), ("there", 0), ("there", 1)]
    assert all(set(v["token_ids"]) <= {3, 4} for v in lines)


def test_bad_prompt_is_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(["generate", *tiny, "-p", ""]) == 2
    assert "error: prompt: is empty" in capsys.readouterr().err


def test_chat_from_a_pipe(
    tiny: list[str], continuation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each line is answered in the light of the ones before; /reset forgets them; too long a line is refused."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hi\nhow\n/reset\n{'x' * 5000}\nhi\n/exit\nnever read\n"))
    assert run(["chat", *tiny, *GREEDY]) == 0
    out, err = capsys.readouterr()
    first = continuation("u:hi;a:")
    second = continuation(f"u:hi;a:{first};u:how;a:")
    assert out == f"{first}\n{second}\n{first}\n"
    assert "error: prompt: " in err and "4096" in err


def test_interrupt_while_streaming(spawn, tiny: list[str]):
    process = spawn("generate", *tiny, "-p", "hello", "--ignore-eos")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "rror" not in err


@pytest.mark.parametrize(
    ("command", "after"),
    [
        (["generate", "-p", "hello"], "load 182/182"),
        pytest.param(["bench", "batching"], "compile ", marks=pytest.mark.slow),  # said once the first is compiled
    ],
    ids=["generate", "bench"],
)
def test_interrupt_while_compiling(spawn, command: list[str], after: str):
    """At once: the default model still has many seconds to compile, and they are not waited for."""
    process = spawn(*command, DEFAULT_MODEL)
    while after not in (line := process.stderr.readline()):
        assert line, "the command ended"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not re.search(r"compile (\d+)/\1$", err, re.MULTILINE), "it was compiled to the end"


def test_reader_of_a_pipe_leaves(spawn, tiny: list[str]):
    process = spawn("generate", *tiny, "-p", "hello", "--ignore-eos")
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in err and "rror" not in err


def test_info(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(["info", tiny[0], "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    with GGUFCheckpoint(tiny[0]) as checkpoint:
        expected = dataclasses.asdict(checkpoint_info(checkpoint)) | dataclasses.asdict(checkpoint.config)
    assert values == json.loads(json.dumps(expected))
    assert values["has_chat_template"] and values["context_len"] == 8192
    assert run(["info", tiny[0]]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(values)


@pytest.mark.slow
def test_bench_batching(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    options = ["--num-requests=4", "--max-prompt=20", "--max-output=8", "--max-num-seqs=1", "--prefill-sizes=32"]
    line = ["bench", "batching", tiny[0], *options, tiny[-1]]
    assert run([*line, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["comparison"], row["mode"]) for row in rows] == [
        ("batching", "continuous"), ("batching", "static"), ("allocation", "paged"), ("allocation", "static")
    ]  # fmt: skip
    assert all(row["num_requests"] == 4 and row["max_prompt"] == 20 for row in rows)
    assert run(line) == 0
    assert "requests/s" in capsys.readouterr().out
