"""bench engine from the command line, on random weights of a tiny shape."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxserve.bench import engine as bench
from jaxserve.bench.ceilings import Ceilings
from jaxserve.bench.report import print_engine
from jaxserve.cli.app import run

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_json_lines_a_file_and_a_table(shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rates = ("read_gb_per_s", "copy_read_plus_write_gb_per_s", "reduce_read_gb_per_s", "skinny_product_gb_per_s")
    ceilings = Ceilings(tflop_per_s=1, dtype="float32", **dict.fromkeys(rates, 1.0))
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: ceilings)
    asked = "--workload=latency,decode --load-format=dummy --batch-sizes=1 --prompt-lens=8,20 --repeats=1"
    options = "--max-num-seqs=1 --prefill-sizes=128 --decode-sizes=1"
    out = Path(shape) / "out.json"
    assert run(["bench", "engine", shape, *asked.split(), *options.split(), f"--output={out}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    start, short, long, decode = rows
    assert [r["workload"] for r in rows] == ["start", "latency", "latency", "decode"]
    assert (short["prompt_len"], long["prompt_len"], decode["batch_size"]) == (8, 20, 1)
    assert all(r["ttft_ms"] > 0 and r["roofline_percent"] > 0 for r in (short, long))
    assert decode["tpot_ms"] > 0 and decode["num_whole_batch_steps"] == 64
    assert set(start["stages_s"]) == {"dummy weights", "compile", "warm-up"}
    assert start["start_s"] >= sum(start["stages_s"].values())
    assert start["command"] == f"jaxserve bench engine {Path(shape).name} {asked} {options}"
    written = json.loads(out.read_text())
    for key in ("device", "driver", "versions", "commit", "command", "ceilings", "decode_sizes", "num_pages"):
        assert written[key] == start[key]
    assert [result | {k: v for k, v in written.items() if k != "results"} for result in written["results"]] == rows

    console = Console(file=io.StringIO(), width=120)
    print_engine(rows, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "TTFT ms" in text and f"{decode['tpot_ms']:.2f}" in text and "dummy weights" in text


@pytest.mark.parametrize(
    "option, message",
    [
        ("--workload=speed", "workload='speed' is not one of latency, decode, prefill, throughput"),
        ("--batch-sizes=1,x", "batch_sizes: '1,x' is not a list of sizes"),
        ("--decode-sizes=", "decode_sizes: '' is not a list of sizes"),
        ("--load-format=dumb", "load_format='dumb' is not one of auto, dummy"),
    ],
)
def test_bad_options_are_one_line(
    shape: str, option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: None)
    assert run(["bench", "engine", shape, option]) == 2
    assert message in capsys.readouterr().err
