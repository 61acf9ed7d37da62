"""Small GGUF files of a llama model, written with the `gguf` package, and weights to compare them with."""

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jaxserve.checkpoint import GGUFCheckpoint
from jaxserve.model.params import Params, is_spec, named_leaves, param_specs
from tests.text.metadata import gguf_metadata

V, D, F, LAYERS, N, K, H = 266, 32, 32, 2, 4, 2, 8
ARCH_KEYS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": H,
    "llama.vocab_size": V,
}
GENERAL_KEYS: dict[str, Any] = {"general.name": "tiny", "general.license": "apache-2.0"}


def weights(tied: bool = True) -> dict[str, np.ndarray]:
    """Float32 tensors by GGUF name, q and k rows in GGUF's interleaved order."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (V, D)
    for i in range(LAYERS):
        layer = {
            "attn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D),
            "attn_output": (D, N * H), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    *,
    arch: str = "llama",
    arch_keys: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file; ``keys`` are added to the tiny model's (or to ``arch_keys``), None removes one.

    ``types`` quantize tensors; a tensor of u8 is stored as it is: rows of blocks of its type.
    """
    writer = gguf.GGUFWriter(path, arch)
    all_keys = {**GENERAL_KEYS, **(ARCH_KEYS if arch_keys is None else arch_keys), **gguf_metadata(), **(keys or {})}
    for key, value in all_keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, array in (weights() if tensors is None else tensors).items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            raw = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_params(checkpoint: GGUFCheckpoint) -> Params:
    """Every parameter, read whole."""
    specs = param_specs(checkpoint.config)
    leaves = [checkpoint.read(name, tuple(slice(0, n) for n in spec.shape)) for name, spec in named_leaves(specs)]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)
