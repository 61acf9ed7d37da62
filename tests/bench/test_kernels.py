"""bench kernels: what it counts, that each way runs all of its calls, and the command."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxserve.bench import kernel_attention, kernel_products
from jaxserve.bench import kernels as bench
from jaxserve.bench.ceilings import Ceilings
from jaxserve.bench.kernel_cases import Case, Setting, Way
from jaxserve.bench.kernels import KERNELS
from jaxserve.bench.report import print_kernels
from jaxserve.bench.roofline import Work
from jaxserve.cli.app import run
from jaxserve.config import MatrixFormat, ModelConfig, MoEConfig, QuantizationConfig, QuantizedMatrices

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
MOE = replace(CONFIG, moe=MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=24))
RATES = ("read_gb_per_s", "copy_read_plus_write_gb_per_s", "reduce_read_gb_per_s", "skinny_product_gb_per_s")
CEILINGS = Ceilings(tflop_per_s=1, dtype="float32", **dict.fromkeys(RATES, 1.0))


def setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {"config": CONFIG, "dtype": jnp.dtype(jnp.float32), "batches": (3,), "context": 21}
    values |= {"prompt_lens": (9,), "page_size": 4, "rotated_bytes": 0, "tuning": {}}
    return Setting(**(values | changes))


def works(name: str, **changes: Any) -> list[tuple[dict[str, Any], dict[str, Work]]]:
    """Of each case: what it is, and the work of each way."""
    cases = KERNELS[name](setting(**changes))
    return [(case.about, {way.implementation: way.work for way in case.ways}) for case in cases]


def test_work_of_products():
    form = MatrixFormat(kind="int4", group_size=16, has_bias=True)
    awq = QuantizationConfig(method="awq", matrices=(QuantizedMatrices(format=form, parameters=("layers.0.qkv",)),))
    for (about, found), (matrix, f, d) in zip(
        works("int4_matmul", config=replace(CONFIG, quantization=awq)),
        [("qkv", 128, 32), ("out", 32, 64), ("gate_up", 96, 32), ("down", 32, 48)],
        strict=True,
    ):
        assert about == {"matrix": matrix, "tokens": 3, "group": 16, "symmetric": False, "whole_zeros": False}
        activations, flops = 4 * 3 * (f + d), 2 * 3 * f * d
        assert found["reference"] == found["xla"] == (f * d // 2 + 2 * 4 * f * (d // 16) + activations, flops)
        assert found["float32 product"] == (4 * f * d + activations, flops)
    about, found = works("int8_matmul")[0]
    assert found["reference"] == (128 * 32 + 4 * 128 + 4 * 3 * (128 + 32), 2 * 3 * 128 * 32)


def test_groups_are_those_that_the_matrix_divides_into():
    assert [about["group"] for about, _ in works("int4_matmul", config=replace(CONFIG, intermediate_size=192))] == [
        32, 64, 32, 64,
    ]  # fmt: skip
    assert works("int4_matmul")[3][0]["group"] == 48  # 48 inputs: one scale a row


def test_work_of_attention_with_and_without_a_window():
    config = replace(CONFIG, layer_windows=(None, 5))
    plain, plain_uneven, windowed, _ = works("decode_attention", config=config)
    token, qo = 2 * 16 * 2 * 4, 2 * 4 * 16 * 4  # bytes of K and V of a token; of a query and its output
    assert plain == (
        {"rows": 3, "keys": 63, "window": None},
        {"reference": Work(3 * (21 * token + qo), 4 * 4 * 16 * 63)},
    )
    assert windowed[1] == {"reference": Work(3 * (5 * token + qo), 4 * 4 * 16 * 15)}
    keys = sum(kernel_attention.uneven(3, 21))
    assert plain_uneven[0]["keys"] == keys > 16 * 21
    assert plain_uneven[1] == {"reference": Work(keys * token + 3 * qo, 4 * 4 * 16 * keys)}
    plain, behind, windowed, _ = works("prefill_attention", config=config)
    assert plain[1] == {"reference": Work(9 * (token + qo), 4 * 4 * 16 * 45)}
    assert behind[1] == {"reference": Work(9 * token + 2 * qo, 4 * 4 * 16 * (8 + 9))}
    assert windowed[1] == {"reference": Work(9 * (token + qo), 4 * 4 * 16 * (1 + 2 + 3 + 4 + 5 * 5))}


def test_work_of_attention_of_a_quantized_cache():
    found = works("quantized_decode_attention")
    assert [about.get("cache") for about, _ in found] == ["int8", "int8", "fp8", "fp8"]
    about, ways = found[0]
    assert about == {"rows": 3, "keys": 63, "window": None, "cache": "int8"}
    qo, flops = 2 * 4 * 16 * 4, 4 * 4 * 16 * 63
    assert ways == {  # vectors of 16 bytes and a scale of two
        "reference": Work(3 * (21 * 2 * 2 * (16 + 2) + qo), flops),
        "float32 cache, reference": Work(3 * (21 * 2 * 2 * 16 * 4 + qo), flops),
    }
    about, ways = works("quantized_prefill_attention")[-1]  # a quarter of a prompt
    assert about == {"new_tokens": 2, "keys": 9, "window": None, "cache": "fp8"}
    assert ways["reference"] == Work(9 * 2 * 2 * (16 + 2) + 2 * 2 * 4 * 16 * 4, 4 * 4 * 16 * (8 + 9))


def test_work_of_appends_and_of_experts():
    moved = 2 * 3 * 2 * 4 * 16 * 4 + 3 * 16 * 4  # qkv in, queries and pages out; cos and sin
    work = Work(moved, 3 * 3 * 2 * 3 * 16)
    assert works("rope_append") == [({"tokens": 3}, {"reference": work, "xla": work})]
    assert works("grouped_matmul") == []
    drawn = np.random.default_rng(0).integers(0, 4, 6)
    ((about, found),) = works("grouped_matmul", config=MOE)
    assert about == {"tokens": 3, "rows": 6}
    moved = len(set(drawn)) * 48 * 32 * 4 + 6 * (48 + 32) * 4
    assert found == dict.fromkeys(("reference", "xla"), Work(moved, 2 * 6 * 48 * 32))


@pytest.mark.parametrize("name", KERNELS)
def test_each_way_runs(name: str):
    config = replace(MOE, qk_norm="head") if name == "rope_append" else MOE
    case = next(iter(KERNELS[name](setting(config=config))))
    by = "xla" if name == "rope_append" else "reference"  # of rotation and append, what a layer does
    assert [way.implementation for way in case.ways if way.is_selected] == [by]
    for way in case.ways:
        assert way.num_calls == 2
        program = way.build()
        outs = jax.tree.leaves(program())
        assert outs and all(bool(jnp.isfinite(out).all()) for out in outs)
        jax.block_until_ready(program())  # again, also where it gave its arguments away
        if name in ("int4_matmul", "int8_matmul") and way.implementation != "reference":
            costs = program.func.lower(*program.args).compile().cost_analysis()
            assert costs["flops"] >= way.num_calls * way.work.flops  # XLA has left no call out


@pytest.mark.parametrize(
    "name",
    [
        "int4_matmul",
        "int8_matmul",
        "decode_attention",
        "prefill_attention",
        "quantized_decode_attention",
        "quantized_prefill_attention",
    ],
)
def test_hopper_has_ways_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch):
    """Traced only: there is none here."""
    for module in (kernel_attention, kernel_products):
        monkeypatch.setattr(module, "on_hopper", lambda: True)
    config = replace(CONFIG, hidden_size=128, intermediate_size=128, head_dim=64)
    half = {"config": config, "dtype": jnp.dtype(jnp.bfloat16), "page_size": 16}
    found = {}
    for tuning in ({}, {"ring": 2}):
        ways = {way.implementation: way for way in next(iter(KERNELS[name](setting(**half, tuning=tuning)))).ways}
        found[len(tuning)] = {key for key in ways if key.startswith("mosaic")}
    assert found == {0: {"mosaic_gpu"}, 1: {"mosaic_gpu", "mosaic_gpu, tuned"}}
    texts = []
    for key in sorted(found[1]):
        program = ways[key].build()
        texts.append(str(program.func.trace(*program.args).jaxpr))
        assert "wgmma" in texts[-1]
    assert texts[0] != texts[1]


def test_programs_take_turns_on_so_many_inputs():
    (_, _, gate_up, _), copies = list(KERNELS["int8_matmul"](setting(rotated_bytes=17_000))), []
    for way in gate_up.ways:
        copies.append(way.num_calls)
    assert copies == [5, 5, 2]  # of 3,456 and of 12,288 bytes
    assert setting(rotated_bytes=1 << 40).num_copies(1) == 16


def test_time_of_kernels_alone():
    case = next(iter(KERNELS["int8_matmul"](setting())))
    program = case.ways[-1].build()
    jax.block_until_ready(program())
    found = bench.kernels_us(program, case.ways[-1].num_calls)
    assert found and all(us > 0 for us in found.values()) and not any(name[-1].isdigit() for name in found)


def test_a_way_that_fails_is_a_row_with_its_error():
    def build():
        raise RuntimeError("no room\nfor it")

    way = Way("xla", False, Work(2e9, 1e12), build, 1)
    row = bench.measured(Case("int4_matmul", {"tokens": 1}, [way]), way, CEILINGS, 1)
    assert row["error"] == "RuntimeError: no room for it" and row["floor_us"] == pytest.approx(2e6) and "us" not in row


@pytest.fixture
def shape(tmp_path: Path) -> str:
    values = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path)


def test_json_lines_a_file_and_a_table(shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: CEILINGS)
    monkeypatch.setattr(bench, "ROUND_S", 0)
    out = Path(shape) / "out.json"
    asked = "--kernels=rope_append --batches=1,2 --repeats=1"
    assert run(["bench", "kernels", f"--shapes={shape}", *asked.split(), f"--output={out}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["tokens"], r["implementation"], r["selected"]) for r in rows] == [
        (tokens, way, way == "xla") for tokens in (1, 2) for way in ("reference", "xla")
    ]
    for row in rows:
        assert row["kernel"] == "rope_append" and row["us"] > 0
        assert row["roofline_percent"] == pytest.approx(100 * row["bytes"] / 1e3 / row["us"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["command"] == f"jaxserve bench kernels --shapes={Path(shape).name} {asked}"
    written = json.loads(out.read_text())
    assert [result | {k: v for k, v in written.items() if k != "results"} for result in written["results"]] == rows
    console = Console(file=io.StringIO(), width=120)
    print_kernels([*rows, rows[0] | {"implementation": "other", "selected": False, "us": rows[0]["us"] / 2}], console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "xla *" in text and "2.00" in text and "rope_append" in text and rows[0]["device"] in text


@pytest.mark.parametrize(
    "option, message",
    [
        ("--kernels=rope", "kernels='rope' is not one of int4_matmul, "),
        ("--kernels=grouped_matmul", "has no experts"),
        ("--batches=0,1", "batches=(0, 1) must be positive sizes"),
        ("--batches=x", "batches: 'x' is not a list of sizes"),
        ("--context=0", "context=0 must be at least 1"),
        ("--repeats=0", "repeats=0 must be at least 1"),
        ("--dtype=int8", "dtype='int8' is not one of auto"),
        ("--tuning=ring", "tuning: 'ring' is not a name and a value"),
        ("--tuning=rings=3", "tuning: no kernel has all of rings; there are block_kv, "),
        ("--shapes=no-such-model", "no-such-model: no config.json, nor one of llama-3.1-8b"),
    ],
)
def test_bad_options_are_one_line(
    shape: str, option: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: None)
    assert run(["bench", "kernels", f"--shapes={shape}", option]) == 2
    assert message in capsys.readouterr().err
