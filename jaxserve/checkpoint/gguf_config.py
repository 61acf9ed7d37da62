"""From a GGUF header to a ``ModelConfig``: every key of the architecture and every tensor is understood or refused."""

import math
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.families import FAMILIES, OUTPUT, GGUFFamily, expected_shapes
from jaxserve.checkpoint.gguf_header import GGUFHeader
from jaxserve.config import ModelConfig, RopeConfig

ROPE_FREQS = "rope_freqs.weight"


def read_family(header: GGUFHeader) -> GGUFFamily:
    """The architecture of a file that holds one whole model."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError("metadata 'general.architecture' is missing")
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture!r} is not supported, only {', '.join(FAMILIES)}")
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"general.type={_shown(metadata['general.type'])} is not a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"split.count={_shown(metadata['split.count'])}: join the parts into one file first")
    return FAMILIES[architecture]


def read_config(family: GGUFFamily, header: GGUFHeader) -> ModelConfig:
    """The config of the metadata; a key that is unknown, or that asks for what is not implemented, is refused."""
    prefix = f"{family.architecture}."
    keys = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    for key, value in keys.items():
        known = key in family.neutral or key in family.sizes or key in family.numbers or key in family.head_dim_keys
        if not known or (key in family.neutral and not _is_one_of(value, family.neutral[key])):
            raise CheckpointError(f"metadata {prefix + key!r}={_shown(value)} is not supported")

    def size(key: str, default: int | None = None) -> int:
        value = keys.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata {prefix}{key} is missing")
        if type(value) is not int or value < 1:
            raise CheckpointError(f"metadata {prefix}{key}={_shown(value)} must be a positive integer")
        return value

    def number(key: str, default: float | None) -> float:
        value = keys.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata {prefix}{key} is missing")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"metadata {prefix}{key}={_shown(value)} must be a positive number")
        return float(value)

    embedding = header.tensors.get(family.top["embed"])
    if embedding is None:
        raise CheckpointError(f"tensor {family.top['embed']!r} is missing")
    defaults = {"vocab_size": embedding.shape[0], "attention.head_count_kv": keys.get("attention.head_count")}
    sizes = {field: size(key, defaults.get(key)) for key, field in family.sizes.items()}
    numbers = {field: number(key, family.default_numbers.get(key)) for key, field in family.numbers.items()}
    head_dim = size(family.head_dim_keys[0], sizes["hidden_size"] // sizes["num_heads"])
    for key in family.head_dim_keys:
        if size(key, head_dim) != head_dim:
            raise CheckpointError(f"metadata {prefix}{key}={keys[key]} differs from the head dimension {head_dim}")
    values: dict[str, Any] = {**sizes, **numbers}
    values["ropes"] = (RopeConfig(theta=values.pop("rope_theta")),)
    try:
        return ModelConfig(
            family=family.family,
            head_dim=head_dim,
            tie_word_embeddings=OUTPUT not in header.tensors,
            eos_token_ids=_eos_token_ids(header.metadata),
            **values,
        )
    except ValueError as e:
        raise CheckpointError(str(e)) from None


def check_tensors(family: GGUFFamily, config: ModelConfig, header: GGUFHeader) -> None:
    """Raises CheckpointError naming the first tensor that is missing, misshapen (with both shapes) or unknown."""
    tensors = header.tensors
    if ROPE_FREQS in tensors:
        raise CheckpointError(f"tensor {ROPE_FREQS!r}: scaled rotary frequencies are not supported")
    expected = set()
    for name, shape in expected_shapes(family, config):
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing, expected shape {shape}")
        if tensors[name].shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {tensors[name].shape}, expected {shape}")
        expected.add(name)
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"tensor {name!r} of shape {tensor.shape} is not one of a {family.family} model")


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    ids = [metadata[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in metadata]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"end-of-sequence ids {_shown(ids)} are not integers")
    return tuple(dict.fromkeys(ids))


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return isinstance(value, (bool, int, float, str)) and value in allowed


def _shown(value: Any) -> str:
    """A metadata value in an error message: one short line."""
    text = repr(value) if isinstance(value, (bool, int, float, str)) else f"<array of {len(value)}>"
    return text if len(text) <= 60 else text[:57] + "..."
