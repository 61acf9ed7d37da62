"""bench engine from the command line, on random weights of a tiny shape."""

import json
from pathlib import Path

import pytest

from jaxserve.bench import engine as bench
from jaxserve.bench.ceilings import Ceilings
from jaxserve.cli.app import run

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_json_lines_and_a_file(shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rates = ("read_gb_per_s", "copy_read_plus_write_gb_per_s", "reduce_read_gb_per_s", "skinny_product_gb_per_s")
    ceilings = Ceilings(tflop_per_s=1, dtype="float32", **dict.fromkeys(rates, 1.0))
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: ceilings)
    options = ["--max-num-seqs=1", "--decode-sizes=1", "--prefill-sizes=16", "--repeats=1", "--prompt-lens=8,20"]
    out = Path(shape) / "out.json"
    command = ["bench", "engine", shape, "--load-format=dummy", "--workload=latency", f"--output={out}", "--json"]
    assert run([*command, *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["workload"], r.get("prompt_len")) for r in rows] == [("start", None), ("latency", 8), ("latency", 20)]
    assert all(r["ttft_ms"] > 0 and r["roofline_percent"] > 0 for r in rows[1:])
    assert "--workload=latency --load-format=dummy --prompt-lens=8,20" in rows[0]["command"]
    assert len(json.loads(out.read_text())["results"]) == 3


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
