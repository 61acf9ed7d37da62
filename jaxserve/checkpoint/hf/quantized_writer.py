"""Quantized matrices as other engines load them: a module's tensors and the ``quantization_config``, in the layouts
that ``hf.quantized_module`` reads.

int4 goes into AWQ's gemm layout where there are zero points and no order of columns, else into GPTQ's: its second
format, or without zero points the first, which every engine has kernels for. int8 goes into compressed-tensors:
pack-quantized, or int-quantized where products round their activations.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.dequantize import pack_nibbles
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.layout import Piece
from jaxserve.checkpoint.hf.quantized_module import AWQ_NIBBLE, unpack_nibbles
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.config import MatrixFormat

Parts = list[tuple[str, Piece]]  # of one tensor: the parameters that it holds boxes of
MIDDLE = 8  # the zero point of an int4 without a bias


class Stored(NamedTuple):
    """One tensor of a module."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


class ModuleLayout:
    """How the modules of a model in one format are written.

    Raises:
        CheckpointError: no layout of other engines has the format.
    """

    def __init__(self, matrix_format: MatrixFormat):
        f = self.format = matrix_format
        if f.kind == "int4" and f.activations == "none" and f.group_size is not None:
            self.name = "awq" if f.has_bias and not f.has_perm else "gptq"
        elif f.kind == "int8" and not f.has_bias and not f.has_perm and f.activation_group is None:
            self.name = "packed" if f.activations == "none" else "plain"
        else:
            raise CheckpointError(f"no safetensors layout has {f}")
        if self.name == "plain" and f.group_size is not None:
            raise CheckpointError(f"group_size={f.group_size}: int8 products have a scale a row in safetensors layouts")

    def config(self, excluded: list[str]) -> dict[str, Any]:
        """``quantization_config``; ``excluded`` are the linear modules that are not quantized."""
        f = self.format
        if self.name == "awq":
            return {
                "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": f.group_size, "zero_point": True,
                "modules_to_not_convert": excluded,
            }  # fmt: skip
        if self.name == "gptq":
            return {
                "quant_method": "gptq", "checkpoint_format": "gptq_v2" if f.has_bias else "gptq", "bits": 4,
                "group_size": f.group_size, "sym": not f.has_bias, "desc_act": f.has_perm, "lm_head": False,
                "pack_dtype": "int32", "dynamic": {f"-:^{name.replace('.', '[.]')}$": {} for name in excluded},
            }  # fmt: skip
        numbers = {"num_bits": 8, "type": "int", "symmetric": True}
        per_row, per_group = {"strategy": "channel"}, {"strategy": "group", "group_size": f.group_size}
        strategy = per_row if f.group_size is None else per_group
        inputs = None if self.name == "packed" else numbers | {"strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": numbers | strategy | {"dynamic": False}, "input_activations": inputs}
        layout = "pack-quantized" if self.name == "packed" else "int-quantized"
        return {
            "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None, "format": layout}}, "ignore": excluded,
        }  # fmt: skip

    def tensors(self, name: str, rows: int, columns: int) -> dict[str, Stored]:
        """The tensors of module ``name``, a matrix [rows, columns].

        Raises:
            CheckpointError: a word of the layout would be cut; names the module.
        """
        words = {"awq": (8, 1), "gptq": (8, 8), "packed": (1, 4), "plain": (1, 1)}[self.name]
        for what, size, word in zip(("rows", "input columns"), (rows, columns), words):
            if size % word:
                raise CheckpointError(f"{name!r}: its {size} {what} cannot be packed {word} a word")
        groups = columns // (self.format.group_size or columns)
        shared = {"qzeros": Stored("I32", (groups, rows // 8)), "scales": Stored("F16", (groups, rows))}
        match self.name:
            case "awq":
                found = {"qweight": Stored("I32", (columns, rows // 8))} | shared
            case "gptq":
                found = {"qweight": Stored("I32", (columns // 8, rows)), "g_idx": Stored("I32", (columns,))} | shared
            case "packed":
                found = {"weight_packed": Stored("I32", (rows, columns // 4)), "weight_shape": Stored("I64", (2,))}
                found["weight_scale"] = Stored("F32", (rows, groups))
            case _:
                found = {"weight": Stored("I8", (rows, columns)), "weight_scale": Stored("F32", (rows, 1))}
        return {f"{name}.{suffix}": stored for suffix, stored in found.items()}

    def arrays(self, checkpoint: Checkpoint, name: str, parts: Parts, num_columns: int) -> dict[str, np.ndarray]:
        """The values of ``tensors``.

        Raises:
            CheckpointError: a scale is no float16, a bias no whole number of scales; names the parameter.
        """
        f, columns = self.format, num_columns
        groups = columns // (f.group_size or columns)
        q = _leaf(checkpoint, parts, "q", columns // (2 if f.kind == "int4" else 1))
        scale = _leaf(checkpoint, parts, "scale", groups)
        match self.name:
            case "packed":
                shape = np.array([len(q), columns], np.int64)
                words = (q.view(np.uint8) ^ 0x80).view(np.int32)
                found = {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}
            case "plain":
                found = {"weight": q, "weight_scale": scale}
            case _:
                zeros = np.full(scale.shape, MIDDLE, np.uint8)
                scales = _exact(parts[0][0], scale)
                if f.has_bias:
                    zeros = _zero_points(parts[0][0], scale, _leaf(checkpoint, parts, "bias", groups))
                numbers = unpack_nibbles(q)
                if self.name == "awq":
                    found = {"qweight": _interleaved(numbers.T), "qzeros": _interleaved(zeros.T)}
                else:
                    group_of = np.arange(columns, dtype=np.int32) // np.int32(f.group_size or columns)
                    if f.has_perm:
                        back = np.argsort(checkpoint.read(f"{parts[0][0]}.perm", (slice(0, columns),)))
                        numbers, group_of = np.ascontiguousarray(numbers[:, back]), group_of[back]
                    stored_zeros = zeros if f.has_bias else zeros - 1  # the first format has 1 less
                    found = {
                        "qweight": np.ascontiguousarray(pack_nibbles(numbers).view(np.int32).T),
                        "g_idx": group_of,
                        "qzeros": pack_nibbles(np.ascontiguousarray(stored_zeros.T)).view(np.int32),
                    }
                found["scales"] = scales
        return {f"{name}.{suffix}": x for suffix, x in found.items()}


def module_layout(formats: Mapping[str, MatrixFormat], checkpoint: Checkpoint) -> ModuleLayout:
    """The layout of all quantized parameters.

    Raises:
        CheckpointError: they have several formats, which no layout says, or one that none has.
    """
    found = list(dict.fromkeys(formats.values()))
    if len(found) != 1:
        raise CheckpointError(f"{checkpoint.path} has matrices of {len(found)} formats, a safetensors layout has one")
    return ModuleLayout(found[0])


def check_module(tensor: str, parts: Parts, formats: Mapping[str, MatrixFormat]) -> bool:
    """Whether ``tensor`` becomes a quantized module.

    Raises:
        CheckpointError: only some of the parameters in it are quantized, or it is no matrix of rows.
    """
    quantized = {parameter in formats for parameter, _ in parts}
    if quantized == {False}:
        return False
    if len(quantized) > 1:
        raise CheckpointError(f"tensor {tensor!r}: only some of the parameters in it are quantized")
    for _, piece in parts:
        if len(piece.shape) != 2 or piece.order[-1] != len(piece.order) - 1 or not tensor.endswith(".weight"):
            raise CheckpointError(f"tensor {tensor!r}: quantized matrices of this layout cannot be written")
    return True


def _leaf(checkpoint: Checkpoint, parts: Parts, leaf: str, width: int) -> np.ndarray:
    """``[rows, width]``, an array of a quantized parameter in the order of the module's rows."""
    out: np.ndarray | None = None
    for parameter, piece in parts:
        rows = _one_column(piece).view(np.arange(piece.shape[0])[:, None])
        values = checkpoint.read(f"{parameter}.{leaf}", (*piece.box[:-1], slice(0, width)))
        if out is None:
            out = np.empty((piece.shape[0], width), values.dtype)
        out[rows.ravel()] = values.reshape(-1, width)
    assert out is not None
    return out


def _one_column(piece: Piece) -> Piece:
    one = slice(0, 1)
    return piece._replace(
        shape=(piece.shape[0], 1),
        split=(*piece.split[:-1], 1),
        take=(*piece.take[:-1], one),
        box=(*piece.box[:-1], one),
    )


def _interleaved(numbers: np.ndarray) -> np.ndarray:
    """``[n, out / 8]`` i32 of ``[n, out]``, eight outputs a word in AWQ's order."""
    eight = numbers.reshape(len(numbers), -1, 8)
    words = np.zeros(eight.shape[:2], np.uint32)
    for i, nibble in enumerate(AWQ_NIBBLE):
        words |= eight[:, :, i].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def _exact(parameter: str, scale: np.ndarray) -> np.ndarray:
    """``[groups, out]`` f16 of ``[out, groups]`` f32."""
    scales = scale.astype(np.float16)
    if (scales != scale).any():
        wrong = scale[scales != scale][0]
        raise CheckpointError(f"params.{parameter}.scale has {wrong}, no float16: it cannot be written exactly")
    return np.ascontiguousarray(scales.T)


def _zero_points(parameter: str, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    zeros = np.rint(-bias / scale)
    wrong = (zeros * scale != -bias) | (zeros < 0) | (zeros > 15)
    if wrong.any():
        raise CheckpointError(
            f"params.{parameter}: a bias of {bias[wrong][0]} with a scale of {scale[wrong][0]} is no zero point of 0 "
            "to 15: it cannot be written exactly"
        )
    return zeros.astype(np.uint8)
