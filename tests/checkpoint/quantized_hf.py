"""Quantized Hugging Face folders: packed as the tools' documentation says, and the same models dequantized.

The numbers are drawn, not rounded from anything; a folder beside each has what they stand for in float32.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.hf.files import TensorFiles
from tests.checkpoint.tiny_hf import Arrays, write_folder

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LINEAR = re.compile(r".*\.(\w+_proj|\w+_proj_with_mqa|q_[ab]_proj|kv_b_proj|w[123])\.weight")
Packed = tuple[Arrays, np.ndarray]  # tensors by their names after the module's, and the matrix [out, in]
Packer = Callable[[np.random.Generator, int, int], Packed]


def write_pair(
    golden: str, config: dict[str, Any], pack: Packer, folder: Path, excluded: str = "nothing", also: str = "nothing"
) -> tuple[Path, Path]:
    """The golden model's folder with its linear layers, and ``also`` others, quantized; and the dequantized one."""
    values = json.loads((GOLDEN / golden / "config.json").read_text())
    files = TensorFiles(GOLDEN / golden)
    r = np.random.default_rng(11)
    quantized, plain = {}, {}
    for name in files:
        is_linear = LINEAR.fullmatch(name) and not re.search(excluded, name)
        if not is_linear and not re.match(also, name):
            quantized[name] = plain[name] = np.array(files[name])
            continue
        tensors, matrix = pack(r, *files[name].shape)
        module = name.removesuffix(".weight")
        quantized |= {f"{module}.{suffix}": x for suffix, x in tensors.items()}
        plain[name] = matrix.astype(np.float32)
    files.close()
    folder.mkdir(exist_ok=True)
    return (
        write_folder(folder / "quantized", values | {"quantization_config": config}, quantized),
        write_folder(folder / "plain", values, plain),
    )


def scales(r: np.random.Generator, *shape: int) -> np.ndarray:
    return (0.01 + 0.03 * r.random(shape)).astype(np.float16)


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """``[n, columns]`` packed along its first axis, the first in the lowest bits: ``[n * bits / 32, columns]`` i32."""
    per_word = 32 // bits
    padded = np.pad(numbers, ((0, -len(numbers) % per_word), (0, 0))).astype(np.uint32)
    out = np.zeros((len(padded) // per_word, padded.shape[1]), np.uint32)
    for i in range(per_word):
        out |= padded[i::per_word] << np.uint32(bits * i)
    return out.view(np.int32)


def gptq(bits: int = 4, group: int = 8, sym: bool = True, v2: bool = False, order: str = "none") -> Packer:
    """``order``: none, a permutation for each module of one input ("shared"), or one for each module ("own")."""

    def pack(r: np.random.Generator, rows: int, columns: int) -> Packed:
        size = columns if group == -1 else group
        groups, top = columns // size, 2**bits
        numbers = r.integers(0, top, (columns, rows))
        zeros = np.full((groups, rows), top // 2) if sym else r.integers(1, top, (groups, rows))
        scale = scales(r, groups, rows)
        if bits == 8:
            scale = (scale / 16).astype(np.float16)
        g_idx = np.arange(columns) // size
        if order != "none":
            g_idx = (np.random.default_rng(columns) if order == "shared" else r).permutation(g_idx)
        stored = words((zeros if v2 else zeros - 1).T, bits).T
        matrix = scale.astype(np.float64)[g_idx] * (numbers - zeros[g_idx])
        tensors = {
            "qweight": words(numbers, bits),
            "qzeros": np.ascontiguousarray(stored),
            "scales": scale,
            "g_idx": g_idx.astype(np.int32),
        }
        return tensors, matrix.T

    return pack


def awq(group: int = 8) -> Packer:
    def interleaved(numbers: np.ndarray) -> np.ndarray:
        """Eight outputs a word, of which 0, 2, 4, 6, 1, 3, 5, 7 follow each other from the lowest nibble up."""
        eight = numbers.reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint32)
        return np.bitwise_or.reduce(eight << np.arange(0, 32, 4, dtype=np.uint32), axis=-1).view(np.int32)

    def pack(r: np.random.Generator, rows: int, columns: int) -> Packed:
        numbers, zeros = r.integers(0, 16, (columns, rows)), r.integers(0, 16, (columns // group, rows))
        scale = scales(r, columns // group, rows)
        matrix = np.repeat(scale.astype(np.float64), group, 0) * (numbers - np.repeat(zeros, group, 0))
        return {"qweight": interleaved(numbers), "qzeros": interleaved(zeros), "scales": scale}, matrix.T

    return pack


def pack_quantized(bits: int = 4, group: int = 8, sym: bool = True, order: bool = False) -> Packer:
    def pack(r: np.random.Generator, rows: int, columns: int) -> Packed:
        size, half = columns if group == -1 else group, 2 ** (bits - 1)
        numbers = r.integers(-half, half, (rows, columns))
        zeros = np.zeros((rows, columns // size), int) if sym else r.integers(-half, half, (rows, columns // size))
        scale = (scales(r, rows, columns // size).astype(np.float32) * 8 / half).astype(jnp.bfloat16)
        g_idx = np.arange(columns) // size
        if order:
            g_idx = np.random.default_rng(columns).permutation(g_idx)
        matrix = scale.astype(np.float64)[:, g_idx] * (numbers - zeros[:, g_idx])
        tensors = {
            "weight_packed": np.ascontiguousarray(words((numbers + half).T, bits).T),
            "weight_scale": scale,
            "weight_shape": np.array([rows, columns], np.int64),
        }
        if not sym:
            tensors["weight_zero_point"] = words(zeros + half, bits)
        if order:
            tensors["weight_g_idx"] = g_idx.astype(np.int32)
        return tensors, matrix

    return pack


def plain_numbers(
    kind: str, strategy: str, *, sym: bool = True, scale_name: str = "weight_scale", block: int = 8
) -> Packer:
    """int8 or fp8 with a scale for each tensor, channel, group of 8 or block."""

    def pack(r: np.random.Generator, rows: int, columns: int) -> Packed:
        if kind == "int8":
            numbers, largest = r.integers(-128, 128, (rows, columns)).astype(np.int8), 128
        else:
            numbers, largest = (448 * (2 * r.random((rows, columns)) - 1)).astype(jnp.float8_e4m3fn), 448
        shape = {
            "tensor": (1,), "channel": (rows, 1), "group": (rows, columns // block),
            "block": (-(-rows // block), -(-columns // block)),
        }[strategy]  # fmt: skip
        scale = (scales(r, *shape).astype(np.float32) * 8 / largest).astype(np.float32)
        whole = scale.astype(np.float64)
        if strategy == "block":
            whole = np.repeat(whole, block, 0)[:rows]
        if strategy in ("block", "group"):
            whole = np.repeat(whole, block, 1)[:, :columns]
        tensors = {"weight": numbers, scale_name: scale}
        values = numbers.astype(np.float64)
        if not sym:
            tensors["weight_zero_point"] = r.integers(-20, 20, (rows, 1)).astype(np.int8)
            values = values - tensors["weight_zero_point"]
        return tensors, values * whole

    return pack


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """compressed-tensors' ``quantization_config`` as its tool writes it."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
                "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
                "observer_kwargs": {}}  # fmt: skip
    group = {"targets": ["Linear"], "weights": defaults | weights, "input_activations": inputs and defaults | inputs,
             "output_activations": None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }  # fmt: skip


def gptq_config(**values: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False, "damp_percent": 0.01,
        "true_sequential": True, "lm_head": False, "static_groups": False, "checkpoint_format": "gptq",
    } | values  # fmt: skip


TOKEN = {"strategy": "token", "dynamic": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": ["gate"]}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
# name -> golden model, quantization_config, packer
SCHEMES: dict[str, tuple[str, dict[str, Any], Packer]] = {
    "gptq": ("llama", gptq_config(), gptq()),
    "gptq, zero points": ("llama", gptq_config(sym=False), gptq(sym=False)),
    "gptq, act-order": ("llama", gptq_config(sym=False, desc_act=True), gptq(sym=False, order="shared")),
    "gptq, orders of their own": ("llama", gptq_config(desc_act=True), gptq(order="own")),
    "gptq v2": ("qwen3", gptq_config(sym=False, checkpoint_format="gptq_v2"), gptq(sym=False, v2=True)),
    "gptq, 8 bits a row": ("llama", gptq_config(bits=8, group_size=-1), gptq(8, -1)),
    "gptq, 8 bits, zero points, act-order": (
        "phi3_short",
        gptq_config(bits=8, sym=False, desc_act=True),
        gptq(8, 8, sym=False, order="shared"),
    ),
    "gptq, experts": ("qwen2_moe", gptq_config(desc_act=True), gptq(order="shared")),
    "awq, experts": ("mixtral", AWQ, awq()),
    "packed": (
        "llama",
        compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8}),
        pack_quantized(),
    ),
    "packed, zero points": (
        "llama",
        compressed("pack-quantized", {"num_bits": 4, "symmetric": False}),
        pack_quantized(group=-1, sym=False),
    ),
    "packed, act-order": (
        "llama",
        compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8, "actorder": "group"}),
        pack_quantized(order=True),
    ),
    "packed, 8 bits": (
        "llama",
        compressed("pack-quantized", {"strategy": "group", "group_size": 8}),
        pack_quantized(8),
    ),
    "int8": ("llama", compressed("int-quantized", {}), plain_numbers("int8", "channel")),
    "int8, zero points": (
        "llama",
        compressed("int-quantized", {"symmetric": False}),
        plain_numbers("int8", "channel", sym=False),
    ),
    "w8a8": ("llama", compressed("int-quantized", {}, TOKEN), plain_numbers("int8", "channel")),
    "float": (
        "llama",
        compressed("float-quantized", {"type": "float"}, TOKEN | {"type": "float"}),
        plain_numbers("fp8", "channel"),
    ),
    "float, one scale": (
        "phi3_short",
        compressed("float-quantized", {"type": "float", "strategy": "tensor"}),
        plain_numbers("fp8", "tensor"),
    ),
    "float in blocks": (
        "llama",
        compressed(
            "float-quantized",
            {"type": "float", "strategy": "block", "block_structure": [8, 8]},
            {"type": "float", "strategy": "group", "group_size": 8, "dynamic": True},
        ),
        plain_numbers("fp8", "block"),
    ),
    "fp8 in blocks": (
        "deepseek_v3",
        FP8 | {"weight_block_size": [8, 8]},
        plain_numbers("fp8", "block", scale_name="weight_scale_inv"),
    ),
    "fp8, one scale": ("qwen3", FP8, plain_numbers("fp8", "tensor")),
}
