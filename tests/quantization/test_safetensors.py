"""Quantized here, written in other tools' layouts, and read back by our readers of those: the same tree."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, open_checkpoint
from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.model.params import named_leaves, param_specs
from jaxserve.quantization.calibrated import CalibratedSource
from jaxserve.quantization.checkpoint import QuantizedCheckpoint, RoundedSource
from jaxserve.quantization.convert import quantize
from jaxserve.quantization.recipe import quantized_config
from tests.checkpoint.quantized_hf import GOLDEN

CONFIGS = {
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False, "desc_act": True},
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True},
    "packed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "plain": {"quant_method": "compressed-tensors", "format": "int-quantized"},
}


def leaves(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    specs = dict(named_leaves(param_specs(checkpoint.config)))
    return {name: checkpoint.read(name, tuple(slice(0, n) for n in spec.shape)) for name, spec in specs.items()}


def quantized(model: str, method: str, group: int | None, symmetric: bool) -> QuantizedCheckpoint:
    source = open_checkpoint(GOLDEN / model)
    config = quantized_config(source.config, method, group, symmetric=symmetric)
    if method in ("gptq", "awq"):
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 64)).tolist()
        return QuantizedCheckpoint(source, config, CalibratedSource(source.read, config, ids), "calibrated")
    return QuantizedCheckpoint(source, config, RoundedSource(source.read, config), method)


@pytest.mark.parametrize(
    "model, method, group, symmetric, layout",
    [
        ("qwen2", "awq", 16, False, "awq"),
        ("qwen2", "gptq", 16, False, "gptq_v2"),
        ("qwen2", "gptq", 16, True, "gptq"),
        ("phi3_short", "int4-rtn", 16, False, "awq"),
        ("mixtral", "int4-rtn", 16, True, "gptq"),
        ("deepseek_v2", "int8", None, False, "packed"),
        ("qwen2", "w8a8", None, False, "plain"),
    ],
)
def test_what_is_written_is_read_as_the_same_tree(model, method, group, symmetric, layout, tmp_path):
    with quantized(model, method, group, symmetric) as source:
        folder = convert(source, tmp_path / "hf", format="safetensors")
        want, config = leaves(source), source.config
        with open_checkpoint(folder) as written:
            got, got_config = leaves(written), written.config
        assert config.quantization is not None and got_config.quantization is not None
        assert got_config.quantization.formats() == config.quantization.formats()
        assert got.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
            assert got[name].dtype == array.dtype, name
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored.items() >= CONFIGS[layout].items()
        if layout != "gptq_v2":  # what own folders keep of their source is enough to write the same files
            own = convert(source, tmp_path / "own")
            again = convert(own, tmp_path / "again", format="safetensors")
            assert _bytes(again) == _bytes(folder)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_files_hold_layers_in_order_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.checkpoint.hf.writer.SHARD_BYTES", 8_000)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    src, dst = GOLDEN / "qwen2", tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(src, dst, method="int4-rtn", group_size=16, format="safetensors", on_progress=stop)
    finished = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.safetensors")}
    assert finished and not (dst / "config.json").exists()
    quantize(src, dst, method="int4-rtn", group_size=16, format="safetensors")
    files = json.loads((dst / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((dst / name).stat().st_mtime_ns == when for name, when in finished.items())
    layers = [(file, int(m[1])) for tensor, file in files.items() if (m := re.search(r"layers\.(\d+)\.", tensor))]
    assert layers == sorted(layers) and len(set(files.values())) > 2
    with open_checkpoint(dst) as written:
        assert leaves(written)["layers.1.down.q"].dtype == np.uint8


def test_what_no_layout_says_is_refused(tmp_path):
    def refused(message: str, src: Path | Checkpoint, **options):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            quantize(src, tmp_path / "no", format="safetensors", **options)
        assert not (tmp_path / "no" / "config.json").exists()

    gpt2 = "'transformer.h.0.attn.c_attn.weight': quantized matrices of this layout cannot be written"
    refused(gpt2, GOLDEN / "gpt2", method="int4-rtn", group_size=16)
    refused("symmetric: quantize='awq' is not one of int4-rtn, gptq", GOLDEN / "llama", method="awq", symmetric=True)
    with quantized("llama", "int4-rtn", 16, False) as source:
        read = source.read
        for changed, value, message in (
            ("layers.0.qkv.scale", 1e-3, "params.layers.0.qkv.scale has 0.001"),
            ("layers.0.qkv.bias", 0.3, "params.layers.0.qkv: a bias of 0.3"),
        ):

            def other(name: str, index: tuple[slice, ...], changed: str = changed, value: float = value) -> np.ndarray:
                return np.full_like(read(name, index), value) if name == changed else read(name, index)

            source.read = other  # as a format that rounds otherwise has it
            with pytest.raises(CheckpointError, match=re.escape(message)):
                convert(source, tmp_path / changed, format="safetensors")
