"""Quantized models in our own format: written, restored, and dequantized when they are read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, open_checkpoint
from jaxserve.checkpoint.convert import convert
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.model.params import named_leaves, num_params, param_specs
from tests.checkpoint.quantized_hf import SCHEMES, write_pair
from tests.checkpoint.test_quantized_gguf import write_model


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def sources(tmp_path: Path, name: str) -> Path:
    if name == "gguf":
        return write_model(tmp_path / "m.gguf", {"token_embd": "Q8_0"}, kind="Q4_1")
    return write_pair(*SCHEMES[name], tmp_path)[0]


@pytest.mark.parametrize("name", ["gptq, experts", "w8a8", "fp8 in blocks", "gguf"])
def test_round_trip(name, tmp_path):
    path = sources(tmp_path, name)
    method = "gguf" if name == "gguf" else "auto"
    folder = convert(path, tmp_path / "ours", quantization=method, dtype="bfloat16")
    with open_checkpoint(path, quantization=method) as source, OrbaxCheckpoint(folder) as ours:
        assert ours.config == source.config and ours.config.quantization is not None
        assert ours.num_params == source.num_params == num_params(source.config)
        for leaf, spec in named_leaves(param_specs(ours.config)):
            want, got = source.read(leaf, whole(spec.shape)), ours.read(leaf, whole(spec.shape))
            assert got.dtype.name == (spec.dtype or "bfloat16"), leaf
            np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=leaf)
    with (
        open_checkpoint(folder, quantization="none") as dequantized,
        open_checkpoint(path, quantization="none") as plain,
    ):
        assert dequantized.config == dataclasses.replace(ours.config, quantization=None)
        for leaf, spec in named_leaves(param_specs(plain.config)):
            want, got = plain.read(leaf, whole(spec.shape)), dequantized.read(leaf, whole(spec.shape))
            tolerance = 2e-6 if got.dtype == np.float32 else 2**-8
            np.testing.assert_allclose(
                got.astype(np.float32), want.astype(np.float32), atol=tolerance * np.abs(want).max(), err_msg=leaf
            )
    assert convert(path, folder, quantization=method, dtype="bfloat16") == folder  # is there already
    with pytest.raises(CheckpointError, match=r"has the checkpoint .* from other files; asked was"):
        convert(path, folder, quantization="none", dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"quantization='awq': .* is quantized with"):
        open_checkpoint(folder, quantization="awq")


def test_dequantized_conversion_has_plain_parameters_only(tmp_path):
    path = sources(tmp_path, "w8a8")
    with OrbaxCheckpoint(convert(path, tmp_path / "dequantized", quantization="none")) as ours:
        assert ours.config.quantization is None
        assert {entry.dtype for entry in ours.entries.values()} <= {"float32", "bfloat16"}
    with pytest.raises(CheckpointError, match=r"came from a quantized model .*, which can be written as orbax only"):
        convert(path, tmp_path / "back", format="safetensors")
    with open_checkpoint(path) as opened, pytest.raises(CheckpointError, match="is open already"):
        convert(opened, tmp_path / "opened", quantization="none")


def test_a_leaf_of_another_type_is_refused(tmp_path):
    folder = convert(sources(tmp_path, "w8a8"), tmp_path / "ours")
    path = folder / "jaxserve.json"
    manifest = json.loads(path.read_text())
    manifest["params"]["layers.0.down.q"]["dtype"] = "uint8"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"parameter layers\.0\.down\.q is of uint8, expected int8"):
        OrbaxCheckpoint(folder)
