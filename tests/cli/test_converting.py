"""jaxserve convert, from a GGUF file to a folder that is the same model."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint.open import open_checkpoint
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.cli.app import run
from tests.architecture.imports import ROOT
from tests.checkpoint.tiny_gguf import write
from tests.cli.conftest import ENVIRONMENT


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_converted_model_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "out"
    assert run(["convert", str(source), str(out)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"{out} is complete" and any("convert 14/14" in line for line in lines)
    facts = []
    for model in (source, out):
        assert run(["info", str(model), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    for name in ("path", "num_bytes", "tensor_bytes"):
        assert facts[0].pop(name) != facts[1].pop(name)
    assert facts[0] == facts[1]
    with open_checkpoint(source) as a, open_checkpoint(out) as b:
        assert isinstance(b, OrbaxCheckpoint)
        for name, entry in b.entries.items():
            whole = tuple(slice(0, n) for n in entry.shape)
            assert np.array_equal(a.read(name, whole), b.read(name, whole)), name
        tokenizers = [c.tokenizer() for c in (a, b)]
        assert len({tuple(t.encode("Grüße, 世界!")) for t in tokenizers if t is not None}) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-model", "out"], "no-such-model"),
        (["{gguf}", "out", "--dtype=int3"], "dtype='int3' is not one of float32"),
        (["{gguf}", "out", "--format=pickle"], "format='pickle' is not one of orbax, safetensors"),
        (["{gguf}", "out", "--format=safetensors"], "did not come from a Hugging Face folder"),
        (["{gguf}", "{gguf}"], "exists and is not a folder"),
        (["{gguf}", "done", "--dtype=bfloat16"], "done has the checkpoint tiny (llama, float32); asked was tiny"),
    ],
)
def test_bad_command_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "tiny.gguf")
    if "done" in arguments:
        assert run(["convert", str(source), "done"]) == 0
    assert run(["convert", *(a.format(gguf=source) for a in arguments)]) == 2
    line = error_line(capsys)
    assert line.startswith("error: ") and named in line


STALL = """
import sys, time
import jaxserve.checkpoint.convert as module
write = module.write_orbax

def slow(checkpoint, plan, files, folder, on_progress):
    def progress(stage, done, total):
        on_progress(stage, done, total)
        if done == 5:
            print("stalled", flush=True)
            time.sleep(60)
    write(checkpoint, plan, files, folder, progress)

module.write_orbax = slow
from jaxserve.cli import main
main()
"""


def test_ctrl_c_leaves_a_folder_that_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = write(tmp_path / "tiny.gguf"), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", STALL, "convert", source, out],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == "stalled\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"interrupted: {out} has 5 of 14 tensors; the same command continues"
    assert "Traceback" not in err
    assert run(["info", str(out)]) == 2
    assert "is not whole: 5 of 14 tensors are there" in error_line(capsys)
    assert run(["convert", str(source), str(out)]) == 0
    assert run(["info", str(out)]) == 0


def test_the_script_is_the_same_command(tmp_path: Path):
    source = write(tmp_path / "tiny.gguf")
    script = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", source, "out", "--dtype", "bfloat16"]
    subprocess.run(script, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    manifest = json.loads((tmp_path / "out" / "jaxserve.json").read_text())
    assert {entry["dtype"] for entry in manifest["params"].values()} == {"bfloat16"}
