"""Folders of `peft` that cannot be served: each refused in one line with the key or tensor at fault."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hf.adapter import CONFIG, TENSORS, read_adapter
from jaxserve.checkpoint.hf.safetensors_header import read_header, view_tensor
from jaxserve.config import ModelConfig
from jaxserve.model.lora import PIECES, factor_shapes
from tests.checkpoint.tiny_hf import safetensors
from tests.families.golden import FOLDER as MODELS
from tests.lora.golden import FOLDER

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def model(name: str = "llama") -> ModelConfig:
    return HFCheckpoint(MODELS / name).config


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    data = np.frombuffer((folder / TENSORS).read_bytes(), np.uint8)
    return {name: view_tensor(data, info) for name, info in read_header(memoryview(data)).items()}


def changed(tmp_path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray | None], name="llama_all") -> Path:
    """A golden adapter with other values in its config, and other tensors; None is without."""
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / name, folder)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    kept = {n: x for n, x in (tensors_of(folder) | tensors).items() if x is not None}
    (folder / TENSORS).write_bytes(safetensors(kept))
    return folder


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' cannot be served, only ['LORA']"),
        ({"bias": "all"}, "bias='all' cannot be served, only ['none']"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' cannot be served, only"),
        ({"use_dora": True}, "use_dora=True cannot be served"),
        ({"lora_bias": True}, "lora_bias=True cannot be served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] cannot be served"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] cannot be served"),
        ({"of_tomorrow": 1}, "of_tomorrow=1 cannot be served"),
        ({"r": 0}, "r=0 is not a positive integer"),
        ({"r": 2.5}, "r=2.5 is not a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha='8' is not a positive number"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj']=-1 is not a positive integer"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=['q_proj'] is not an object"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is no regular expression: "),
        ({"use_rslora": 1}, "use_rslora=1 is not true or false"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all' is not a list of layers"),
        ({"r": 9}, "r=9 of model.layers.0.mlp.down_proj is more than max_lora_rank=8"),
        ({"r": 5}, "tensor 'model.layers.0.mlp.down_proj.lora_A.weight' of shape (4, 48) has rank 4, "
         "adapter_config.json says 5"),
    ],
)  # fmt: skip
def test_what_the_config_may_not_say(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_adapter(changed(tmp_path, config, {}), model(), 8)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({f"{Q0}.lora_A.weight": None}, "tensor 'model.layers.0.self_attn.q_proj.lora_A.weight' is missing"),
        ({f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None},
         "tensor 'model.layers.0.self_attn.q_proj.lora_A.weight' is missing: target_modules names its module"),
        ({f"{Q0}.lora_A.weight": np.zeros((4, 31), np.float32)},
         "tensor 'model.layers.0.self_attn.q_proj.lora_A.weight' has shape (4, 31), expected (4, 32)"),
        ({f"{Q0}.lora_B.weight": np.zeros((31, 4), np.float32)},
         "tensor 'model.layers.0.self_attn.q_proj.lora_B.weight' has shape (31, 4), expected (32, 4)"),
        ({f"{Q0}.lora_B.weight": np.zeros(32, np.float32)}, "has shape (32,), expected two axes"),
        ({f"{Q0}.lora_B.weight": np.zeros((32, 4), np.int32)}, "of type I32 cannot be read, only ('F64', "),
        ({f"{Q0}.lora_magnitude_vector": np.zeros(32, np.float32)}, "is not the A or B of a matrix' adapter"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)},
         "tensor 'base_model.model.lm_head.lora_A.weight': this module cannot have an adapter: only down_proj, "
         "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj can"),
        ({"base_model.model.model.layers.4.mlp.up_proj.lora_A.weight": np.zeros((4, 32), np.float32)},
         "layers.4.mlp.up_proj.lora_A.weight': this module cannot have an adapter"),
    ],
)  # fmt: skip
def test_what_the_tensors_may_not_be(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_adapter(changed(tmp_path, {}, tensors), model(), 8)


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder with adapter_config\.json and"):
        read_adapter(tmp_path / "nowhere", model(), 8)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    with pytest.raises(CheckpointError, match=f"{TENSORS}: cannot be read"):
        read_adapter(tmp_path, model(), 8)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which can run code"):
        read_adapter(tmp_path, model(), 8)
    (tmp_path / TENSORS).write_bytes(safetensors({}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {TENSORS} has no tensors"):
        read_adapter(tmp_path, model(), 8)


def test_experts_have_no_adapters_but_their_layers_attention_may(tmp_path):
    """Latent attention: its output only."""
    name = "base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight"
    folder = changed(tmp_path, {}, {name: np.zeros((4, 32), np.float32)})
    with pytest.raises(CheckpointError, match=re.escape(f"{name}': this module cannot have an adapter: experts")):
        read_adapter(folder, model(), 8)
    assert list(factor_shapes(model("mixtral"), 0, 2)) == ["qkv", "attn_out"]
    assert list(factor_shapes(model("deepseek_v3"), 0, 2)) == ["attn_out", "gate_up", "down"]
    assert list(factor_shapes(model(), 0, 2)) == list(PIECES)


def test_patterns_say_the_rank_and_scale_of_a_module():
    """Rank-stabilised: alpha / sqrt(r)."""
    adapter = read_adapter(FOLDER / "llama_some", model(), 3)
    tensors = tensors_of(FOLDER / "llama_some")
    assert adapter.rank == 3
    assert [list(layer) for layer in adapter.layers] == [["qkv", "down"], [], ["qkv", "down"], []]
    a, b = adapter.layers[2]["qkv"]
    q = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"
    np.testing.assert_array_equal(a[0, :2], tensors[q.format("A")])
    np.testing.assert_array_equal(a[:, 2], 0)
    np.testing.assert_array_equal(a[1], 0)  # k has none
    np.testing.assert_allclose(b[:, :2, :, :2].reshape(32, 2), tensors[q.format("B")] * 5 / 2**0.5, rtol=1e-6)
    down = tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"]
    np.testing.assert_allclose(adapter.layers[2]["down"][1], down * 3 / 3**0.5, rtol=1e-6)
