"""Bytes and arithmetic of the 8B shape, by hand."""

from dataclasses import replace

import pytest

from jaxserve.bench.ceilings import Ceilings, measure_ceilings
from jaxserve.bench.roofline import PlainRow, Roofline
from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import MoEConfig
from tests import tiny

CEILINGS = Ceilings(
    read_gb_per_s=3000,
    copy_read_plus_write_gb_per_s=2500,
    reduce_read_gb_per_s=3000,
    skinny_product_gb_per_s=2900,
    tflop_per_s=700,
    dtype="bfloat16",
)
LLAMA = read_shape("llama-3.1-8b")
ROOFLINE = Roofline.of(LLAMA, 2, CEILINGS)
# qkv (32 + 2 * 8) * 128 x 4096, output 4096 x 4096, gate, up and down 14336 x 4096 each, two norms.
LAYER = 6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096 + 2 * 4096
HEAD = 128256 * 4096
BODY = 32 * LAYER + 4096  # and the last norm


def test_an_8b_step_reads_15_gb_of_weights():
    assert ROOFLINE.weight_bytes(1) == 2 * (BODY + HEAD) == 15_009_849_344
    assert ROOFLINE.weight_bytes(2048, 0) == 2 * BODY


def test_a_token_of_context_is_128_kib():
    one, two = (ROOFLINE.work([PlainRow(start, 1)]).bytes for start in (895, 896))
    assert two - one == 128 * 1024


def test_a_decode_step_at_batch_64():
    work = ROOFLINE.work([PlainRow(899, 1)] * 64)
    assert work.bytes == 2 * (BODY + HEAD) + 64 * 900 * 131072 + 64 * 128256 * 4
    assert work.flops == 64 * (2 * (BODY + HEAD) + 32 * 4 * 32 * 128 * 900)
    assert ROOFLINE.floor_s(work) == work.bytes / 3e12
    percent = ROOFLINE.of_steps([[PlainRow(899, 1)] * 64] * 3, duration_s=3 * work.bytes / 1.5e12)
    assert percent["roofline_percent"] == pytest.approx(50) and percent["gb_per_s"] == pytest.approx(1500)


def test_a_prompt_is_bound_by_arithmetic():
    work = ROOFLINE.work([PlainRow(0, 2048)])
    pairs = 2048 * 2049 // 2
    assert work.flops == 2048 * 2 * BODY + 2 * HEAD + 32 * 4 * 32 * 128 * pairs
    assert ROOFLINE.floor_s(work) == work.flops / 700e12
    chunks = [ROOFLINE.work([PlainRow(0, 1024, False)]), ROOFLINE.work([PlainRow(1024, 1024)])]
    assert sum(c.flops for c in chunks) == work.flops


def test_devices_share_the_work():
    work = ROOFLINE.work([PlainRow(100, 1)])
    assert Roofline.of(LLAMA, 2, CEILINGS, 2).floor_s(work) == ROOFLINE.floor_s(work) / 2


def test_a_tied_embedding_is_read_as_the_head():
    tied = Roofline.of(replace(LLAMA, tie_word_embeddings=True), 2, CEILINGS)
    assert tied.weight_bytes(1) == ROOFLINE.weight_bytes(1)


def test_a_window_bounds_what_is_read_and_seen():
    """Window 4: queries at 2, 3, 4 see 3, 4 and 4 keys and read keys 0 to 4; one at 10 reads 7 to 10."""
    one_layer = replace(tiny.CONFIG, num_layers=1)
    everything = Roofline.of(one_layer, 4, CEILINGS)
    windowed = Roofline.of(replace(one_layer, layer_windows=(4,)), 4, CEILINGS)
    assert windowed.work([PlainRow(2, 3)]).bytes == everything.work([PlainRow(2, 3)]).bytes
    assert everything.work([PlainRow(2, 3)]).flops - windowed.work([PlainRow(2, 3)]).flops == 4 * 8 * 8 * 1
    per_token = 2 * 4 * 8 * 4
    assert everything.work([PlainRow(10, 1)]).bytes - windowed.work([PlainRow(10, 1)]).bytes == 7 * per_token


def test_experts_are_read_as_often_as_tokens_meet_them():
    moe = replace(tiny.CONFIG, moe=MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=16))
    roofline = Roofline.of(moe, 4, CEILINGS)
    expert = 4 * 3 * 16 * 32  # layers, gate and up and down
    assert roofline.expert_params == expert
    one, many = roofline.weight_bytes(1), roofline.weight_bytes(10_000)
    assert many - one == pytest.approx(4 * expert * 6)
    tokens = [roofline.work([PlainRow(0, 1)] * n).flops for n in (1, 2)]
    per_token = 2 * (roofline.dense_params + 2 * expert + roofline.head_params) + 4 * 4 * 8 * 8
    assert tokens[1] - tokens[0] == per_token


def test_ceilings_are_measured():
    found = measure_ceilings("float32", read_bytes=1 << 20, product_size=64)
    assert found.read_gb_per_s >= found.reduce_read_gb_per_s > 0 and found.tflop_per_s > 0
    assert found.dtype == "float32" and found.copy_read_plus_write_gb_per_s > 0
