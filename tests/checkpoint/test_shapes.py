"""Shapes by name and by config.json, and what is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.shapes import read_shape
from jaxserve.model.params import num_params

GOOD: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def test_known_shapes():
    small, large = read_shape("llama-3.1-8b"), read_shape("llama-3.3-70b")
    assert (num_params(small), num_params(large)) == (8_030_261_248, 70_553_706_496)  # as their model cards say
    assert small.ropes[0].theta == 5e5 and small.max_position_embeddings == 131_072


def test_a_folder_or_its_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    config = read_shape(tmp_path)
    assert config == read_shape(tmp_path / "config.json")
    assert (config.head_dim, config.num_kv_heads, config.norm_eps) == (8, 4, 1e-6)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"vocab_size": None}, r"config\.json: vocab_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], match: str):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(CheckpointError, match=match):
        read_shape(tmp_path)


def test_nothing_of_that_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no-such: no config.json, nor one of llama-3.1-8b"):
        read_shape("no-such")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_shape(tmp_path)
