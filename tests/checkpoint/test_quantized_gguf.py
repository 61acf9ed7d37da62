"""GGUF matrices that stay as they are, against the same file dequantized."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, GGUFCheckpoint, open_checkpoint
from jaxserve.checkpoint.dequantize import DequantizedSource
from jaxserve.config import ModelConfig
from jaxserve.model.params import named_leaves, param_specs
from tests.checkpoint.test_gguf_types import KEYS, D, F, H, K, N, V
from tests.checkpoint.tiny_gguf import write

E = 3
FORMATS = {"Q4_0": ("int4", False), "Q4_1": ("int4", True), "Q8_0": ("int8", False)}


def write_model(path: Path, kinds: dict[str, str], *, kind: str, experts: bool = False, arch: str = "llama") -> Path:
    """One layer of ``kind``; ``kinds`` of tensors that are of another."""
    r = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (V, D), "output": (V, D), "blk.0.attn_q": (N * H, D), "blk.0.attn_k": (K * H, D),
        "blk.0.attn_v": (K * H, D), "blk.0.attn_output": (D, N * H),
    }  # fmt: skip
    if experts:
        shapes |= {"blk.0.ffn_gate_exps": (E, F, D), "blk.0.ffn_up_exps": (E, F, D), "blk.0.ffn_down_exps": (E, D, F)}
    else:
        shapes |= {"blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F)}
    types = {f"{t}.weight": gguf.GGMLQuantizationType[kinds.get(t, kind)] for t in shapes}
    tensors = {
        f"{t}.weight": gguf.quants.quantize(r.standard_normal(shape, np.float32), types[f"{t}.weight"])
        for t, shape in shapes.items()
    }
    if experts:
        tensors["blk.0.ffn_gate_inp.weight"] = r.standard_normal((E, D), np.float32)
    for vector in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{vector}.weight"] = r.standard_normal(D, np.float32)
    keys = KEYS | ({"llama.expert_count": E, "llama.expert_used_count": 2} if experts else {})
    return write(path, arch=arch, arch_keys=keys, tensors=tensors, types=types)


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def part_of(shape: tuple[int, ...], r: np.random.Generator) -> tuple[slice, ...]:
    starts = [int(r.integers(0, n)) for n in shape]
    return tuple(slice(start, int(r.integers(start + 1, n + 1))) for start, n in zip(starts, shape))


def check(path: Path) -> ModelConfig:
    """That every parameter and every part of its arrays is what the dequantized file says; the config."""
    r = np.random.default_rng(1)
    with GGUFCheckpoint(path, quantized="kept") as kept, GGUFCheckpoint(path) as plain:
        assert plain.config.quantization is None
        source = DequantizedSource(kept.read, kept.config)
        assert source.config == plain.config and kept.num_params == plain.num_params
        for name, spec in named_leaves(param_specs(plain.config)):
            want = plain.read(name, whole(spec.shape))
            np.testing.assert_allclose(source.read(name, whole(spec.shape)), want, rtol=1e-5, atol=1e-6, err_msg=name)
            for _ in range(3):
                part = part_of(spec.shape, r)
                np.testing.assert_allclose(source.read(name, part), want[part], rtol=1e-5, atol=1e-6, err_msg=name)
        for name, spec in named_leaves(param_specs(kept.config)):
            array, part = kept.read(name, whole(spec.shape)), part_of(spec.shape, r)
            assert array.shape == spec.shape and array.dtype.name == (spec.dtype or "float32"), name
            np.testing.assert_array_equal(kept.read(name, part), array[part], err_msg=name)
        return kept.config


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", FORMATS)
def test_parameters_of_one_type(kind, experts, tmp_path):
    config = check(write_model(tmp_path / "m.gguf", {}, kind=kind, experts=experts))
    assert config.quantization is not None and config.quantization.method == "gguf"
    [matrices] = config.quantization.matrices
    assert (matrices.format.kind, matrices.format.has_bias, matrices.format.group_size) == (*FORMATS[kind], 32)
    mlp = ("experts_gate_up", "experts_down") if experts else ("gate_up", "down")
    assert set(matrices.parameters) == {"embed", "head", *(f"layers.0.{x}" for x in ("qkv", "attn_out", *mlp))}


def test_what_is_fused_of_several_types_or_of_others_is_dequantized(tmp_path):
    kinds = {"blk.0.attn_v": "Q8_0", "blk.0.ffn_down": "Q5_0", "token_embd": "Q8_0"}
    config = check(write_model(tmp_path / "m.gguf", kinds, kind="Q4_1"))
    assert config.quantization is not None
    formats = {name: f.kind for name, f in config.quantization.formats().items()}
    assert formats == {"embed": "int8", "head": "int4", "layers.0.attn_out": "int4", "layers.0.gate_up": "int4"}


def test_the_doors_option(tmp_path):
    path = write_model(tmp_path / "m.gguf", {}, kind="Q4_0")
    for quantization, is_kept in (("auto", False), ("none", False), ("gguf", True)):
        with open_checkpoint(path, quantization=quantization) as checkpoint:
            assert (checkpoint.config.quantization is not None) == is_kept
    with pytest.raises(CheckpointError, match=r"quantization='gptq': .*m.gguf is not quantized so that it could be"):
        open_checkpoint(path, quantization="gptq")
    plain = write_model(tmp_path / "f32.gguf", {}, kind="Q5_0")
    with pytest.raises(CheckpointError, match=r"quantization='gguf': .*f32.gguf is not quantized so that it could be"):
        open_checkpoint(plain, quantization="gguf")
