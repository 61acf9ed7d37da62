"""Models known by their shapes alone, for engines with random weights: a ``config.json``, or a name of the table."""

import json
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import ModelConfig, RopeConfig

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# name -> the keys of a Hugging Face config.json that give the model's shapes.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3.3-70b": _LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def read_shape(name_or_path: str | Path) -> ModelConfig:
    """The config of a name of ``SHAPES``, of a ``config.json``, or of a folder with one.

    Raises:
        CheckpointError: there is nothing of that name, or the file cannot be used; names the key.
    """
    name = str(name_or_path)
    if name in SHAPES:
        return plain_llama_config(SHAPES[name], name)
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{name}: no config.json, nor one of {', '.join(SHAPES)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name}: not a JSON object")
    return plain_llama_config(values, path.name)


def plain_llama_config(values: dict[str, Any], name: str) -> ModelConfig:
    """``ModelConfig`` of a llama without rope scaling."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(key, default)
        if value is None or isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise CheckpointError(f"{name}: {key}={value!r} is not a {kind.__name__}")
        return kind(value)

    if values.get("model_type") != "llama":
        raise CheckpointError(f"{name}: model_type={values.get('model_type')!r} is not llama")
    if values.get("rope_scaling") is not None:
        raise CheckpointError(f"{name}: rope_scaling={values['rope_scaling']!r} is not implemented yet")
    heads, width = get("num_attention_heads", int), get("hidden_size", int)
    try:
        return ModelConfig(
            vocab_size=get("vocab_size", int),
            hidden_size=width,
            intermediate_size=get("intermediate_size", int),
            num_layers=get("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", int, heads),
            head_dim=get("head_dim", int, width // heads),
            max_position_embeddings=get("max_position_embeddings", int, 2048),
            tie_word_embeddings=get("tie_word_embeddings", bool, False),
            norm_eps=get("rms_norm_eps", float, 1e-6),
            ropes=(RopeConfig(theta=get("rope_theta", float, 10_000.0)),),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
