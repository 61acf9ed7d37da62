"""The quantized linear layers of a Hugging Face folder: several tensors each, in one of four layouts, as one matrix.

What is stored how:

* gptq (AutoGPTQ, GPTQModel): ``qweight`` ``[in * bits / 32, out]`` i32, element i of an input run at bit ``i * bits``;
  ``qzeros`` ``[groups, out * bits / 32]`` i32, the same along out, 1 less in the first format; ``scales`` ``[groups,
  out]``; ``g_idx`` ``[in]`` i32, the group of each input column.
* awq (AutoAWQ's gemm): ``qweight`` ``[in, out / 8]`` i32 with outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest
  nibble up; ``qzeros`` ``[groups, out / 8]`` likewise; ``scales`` ``[groups, out]``.
* packed (compressed-tensors' pack-quantized): ``weight_packed`` ``[out, in * bits / 32]`` i32, unsigned;
  ``weight_scale`` ``[out, groups]``; ``weight_zero_point`` ``[out * bits / 32, groups]``, packed along out;
  ``weight_g_idx`` ``[in]``; ``weight_shape``.
* plain: ``weight`` ``[out, in]`` I8 or F8_E4M3; ``weight_scale`` for all, for each row, group or block;
  ``weight_zero_point``. DeepSeek calls its scales of 128 x 128 blocks ``weight_scale_inv``, and they multiply, too.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.dequantize import dequantize, pack_nibbles
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.files import TensorFiles
from jaxserve.checkpoint.hf.safetensors_header import FLOATS, TensorInfo
from jaxserve.checkpoint.hf.scheme import Scheme
from jaxserve.config import MatrixFormat

AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight outputs is
CHUNK_ELEMENTS = 2**22  # of numbers that are unpacked at once
INTEGERS = ("I32",)


class Layout(NamedTuple):
    """Tensor names after the module's: the one that shows a module is quantized, and those beside it."""

    numbers: str
    scale: tuple[str, ...]  # of which it has one
    zeros: str
    order: str | None
    others: tuple[str, ...] = ()


LAYOUTS = {
    "gptq": Layout("qweight", ("scales",), "qzeros", "g_idx"),
    "awq": Layout("qweight", ("scales",), "qzeros", None),
    "packed": Layout("weight_packed", ("weight_scale",), "weight_zero_point", "weight_g_idx", ("weight_shape",)),
    "plain": Layout("weight", ("weight_scale", "weight_scale_inv"), "weight_zero_point", None),
}


class QuantizedModule:
    """One module as one matrix [out, in].

    Attributes:
        name: of the module.
        shape: (out, in).
        tensors: all that it is made of.
        perm: ``[in]`` i32, the input element that each column of ``numbers`` is for; None where they are in order.
        format: of the parameter that it is a part of.

    Raises:
        CheckpointError: a tensor is missing or of the wrong type or shape, a group does not divide, g_idx has what is
            no group; names the tensor and both numbers.
    """

    def __init__(self, name: str, files: TensorFiles, scheme: Scheme):
        self.name, self._files, self._scheme = name, files, scheme
        self._layout = LAYOUTS[scheme.layout]
        numbers = self._info(self._layout.numbers, self._number_types())
        if len(numbers.shape) != 2:
            raise self._wrong(self._layout.numbers, f"has shape {numbers.shape}, expected two axes")
        self.shape = self._shape(numbers.shape)
        self._group = scheme.group_size or self.shape[1]
        if self.shape[1] % self._group:
            raise self._wrong(
                self._layout.numbers,
                f"has {self.shape[1]} input columns, which group_size={self._group} does not divide",
            )
        self._num_groups = self.shape[1] // self._group
        self._scale = self._one_of(self._layout.scale)
        self._check_scale()
        has_zeros = self._has(self._layout.zeros)
        if scheme.symmetric and scheme.layout in ("packed", "plain") and has_zeros:
            raise self._wrong(self._layout.zeros, "is there, but the config says symmetric")
        if not has_zeros and (not scheme.symmetric or scheme.layout in ("gptq", "awq")):
            raise CheckpointError(f"tensor {self._full(self._layout.zeros)!r} is missing")
        if has_zeros:
            self._check_zeros()
        self.perm = self._read_order()
        self.format: MatrixFormat = scheme.matrix_format(has_perm=self.perm is not None)
        self.tensors = {self._full(s) for s in (self._layout.numbers, self._scale, *self._layout.others)}
        self.tensors |= {self._full(s) for s in (self._layout.zeros, self._layout.order) if s and self._has(s)}

    # Parts of the matrix in our own layout.

    def leaf(self, leaf: str, rows: np.ndarray, columns: slice) -> np.ndarray:
        """``columns`` of ``rows`` of an array of ``model.quantized.QuantizedMatrix``: q, scale or bias."""
        if leaf == "q":
            return self._q(rows)[:, columns]
        scale = self.scales()[rows]
        if leaf == "scale":
            if self._scheme.symmetric:
                self._check_symmetric()
            return scale[:, columns]
        return self.biases(scale, rows)[:, columns]

    def dequantized(self) -> np.ndarray:
        """The whole matrix, f32."""
        rows = np.arange(self.shape[0])
        scale = self.scales()
        bias = None if self._scheme.symmetric else self.biases(scale, rows)
        if self._scheme.symmetric:
            self._check_symmetric()
        return dequantize(self.format, self._q(rows), scale, bias, self.perm)

    def _q(self, rows: np.ndarray) -> np.ndarray:
        """``[rows, in / 2]`` u8, or ``[rows, in]`` i8 or fp8; columns sorted by group."""
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        if len(rows) > step:
            return np.concatenate([self._q(rows[i : i + step]) for i in range(0, len(rows), step)])
        stored, bits = self._files[self._full(self._layout.numbers)], self._scheme.bits
        match self._scheme.layout:
            case "plain":
                return _take(stored, rows)
            case "packed":  # little-endian words: their bytes have two nibbles, or one number, each
                q = np.ascontiguousarray(_take(stored, rows)).view(np.uint8)[:, : self.shape[1] * bits // 8]
            case "gptq":
                q = np.ascontiguousarray(_take(stored, rows, axis=1).T).view(np.uint8)
            case "awq":
                return pack_nibbles(_awq_numbers(stored, rows).T)
        if self.perm is not None:
            q = pack_nibbles(unpack_nibbles(q)[:, self.perm]) if bits == 4 else q[:, self.perm]
        return q if bits == 4 else (q ^ 0x80).view(np.int8)

    def scales(self) -> np.ndarray:
        """``[out, groups]`` f32; ``[out, 1]`` where a row has one."""
        scale = np.asarray(self._files[self._full(self._scale)], np.float32)
        if self._scheme.layout in ("gptq", "awq"):
            return np.ascontiguousarray(scale.T)
        if self._scheme.block_rows is not None:
            return np.repeat(scale, self._scheme.block_rows, axis=0)[: self.shape[0]]
        if scale.size == 1:  # for all
            return np.full((self.shape[0], 1), scale.reshape(()))
        return scale.reshape(self.shape[0], -1)

    def zeros(self) -> np.ndarray:
        """Zero points ``[out, groups]`` f32, of unsigned numbers but in the plain layout."""
        stored, bits = self._files[self._full(self._layout.zeros)], self._scheme.bits
        num_rows = self.shape[0]  # the last word of a column may have room for more
        match self._scheme.layout:
            case "plain":
                return stored.reshape(num_rows, -1).astype(np.float32)
            case "packed":
                return _numbers_along_words(np.ascontiguousarray(stored.T), bits)[:, :num_rows].T
            case "gptq":
                return _numbers_along_words(stored, bits)[:, :num_rows].T + self._scheme.zero_offset
            case "awq":
                return _awq_numbers(stored, np.arange(num_rows)).T.astype(np.float32)

    def biases(self, scale: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What is added to ``scale`` times the numbers."""
        middle = 128 if self._scheme.kind == "int8" and self._scheme.layout != "plain" else 0  # ours are signed
        return scale * (middle - self.zeros()[rows])

    def _check_symmetric(self) -> None:
        if not self._has(self._layout.zeros):
            return
        zeros, middle = self.zeros(), 2 ** (self._scheme.bits - 1)
        if (zeros != middle).any():
            raise self._wrong(
                self._layout.zeros,
                f"has a zero point of {int(zeros[zeros != middle][0])}, a symmetric module has {middle} everywhere",
            )

    # What the tensors must be.

    def _number_types(self) -> tuple[str, ...]:
        if self._scheme.layout != "plain":
            return INTEGERS
        return ("I8",) if self._scheme.kind == "int8" else ("F8_E4M3",)

    def _shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        per_word = 32 // self._scheme.bits
        match self._scheme.layout:
            case "gptq":
                return stored[1], stored[0] * per_word
            case "awq":
                return stored[1] * per_word, stored[0]
            case "plain":
                return stored[0], stored[1]
        info = self._info("weight_shape", ("I64", "I32"))
        if info.shape != (2,):
            raise self._wrong("weight_shape", f"has shape {info.shape}, expected (2,)")
        rows, columns = map(int, self._files[self._full("weight_shape")])
        if (rows, -(-columns // per_word)) != stored:
            raise self._wrong("weight_packed", f"has shape {stored}, weight_shape says {(rows, columns)}")
        return rows, columns

    def _check_scale(self) -> None:
        shape, (rows, _) = self._info(self._scale, FLOATS).shape, self.shape
        allowed: tuple[tuple[int, ...], ...]
        if self._scheme.layout in ("gptq", "awq"):
            allowed = ((self._num_groups, rows),)
        elif self._scheme.block_rows is not None:
            allowed = ((-(-rows // self._scheme.block_rows), self._num_groups),)
        elif self._scheme.group_size is None:
            allowed = ((rows, 1), (rows,), (1,), (), (1, 1))
        else:
            allowed = ((rows, self._num_groups),)
        if shape not in allowed:
            raise self._wrong(self._scale, f"has shape {shape}, expected {allowed[0]}")

    def _check_zeros(self) -> None:
        info = self._info(self._layout.zeros, ("I8",) if self._scheme.layout == "plain" else INTEGERS)
        rows, per_word = self.shape[0], 32 // self._scheme.bits
        words = -(-rows // per_word)
        match self._scheme.layout:
            case "plain":
                want = (rows, self._num_groups)
            case "packed":
                want = (words, self._num_groups)
            case _:
                want = (self._num_groups, words)
        if info.shape != want and math.prod(info.shape) != math.prod(want) != rows:
            raise self._wrong(self._layout.zeros, f"has shape {info.shape}, expected {want}")

    def _read_order(self) -> np.ndarray | None:
        """The order that sorts the input columns by group; None where they are sorted."""
        suffix, columns = self._layout.order, self.shape[1]
        if suffix is None or not self._has(suffix):
            if self._scheme.is_sorted and suffix is not None:
                raise CheckpointError(f"tensor {self._full(suffix)!r} is missing: columns have an order of their own")
            return None
        if self._info(suffix, INTEGERS).shape != (columns,):
            raise self._wrong(suffix, f"has shape {self._info(suffix, INTEGERS).shape}, expected {(columns,)}")
        groups = self._files[self._full(suffix)]
        if groups.min() < 0 or groups.max() >= self._num_groups:
            found = groups.min() if groups.min() < 0 else groups.max()
            raise self._wrong(suffix, f"has group {found}, there are {self._num_groups}")
        in_order = np.arange(columns) // self._group
        if (groups == in_order).all():
            return None
        order = np.argsort(groups, kind="stable")
        if (groups[order] != in_order).any():
            counts = np.bincount(groups, minlength=self._num_groups)
            group = int(np.flatnonzero(counts != self._group)[0])
            raise self._wrong(suffix, f"has {counts[group]} columns in group {group}, expected {self._group}")
        return order.astype(np.int32)

    def _full(self, suffix: str) -> str:
        return f"{self.name}.{suffix}"

    def _has(self, suffix: str) -> bool:
        return self._full(suffix) in self._files.infos

    def _one_of(self, suffixes: tuple[str, ...]) -> str:
        found = [s for s in suffixes if self._has(s)]
        if len(found) != 1:
            names = " or ".join(repr(self._full(s)) for s in suffixes)
            raise CheckpointError(f"tensor {names} is missing" if not found else f"both tensors {names} are there")
        return found[0]

    def _info(self, suffix: str, dtypes: tuple[str, ...]) -> TensorInfo:
        info = self._files.infos.get(self._full(suffix))
        if info is None:
            raise CheckpointError(f"tensor {self._full(suffix)!r} is missing")
        if info.dtype not in dtypes:
            raise self._wrong(suffix, f"is of type {info.dtype}, expected {' or '.join(dtypes)}")
        return info

    def _wrong(self, suffix: str, what: str) -> CheckpointError:
        return CheckpointError(f"tensor {self._full(suffix)!r} {what}")


def find_modules(files: TensorFiles, scheme: Scheme) -> dict[str, QuantizedModule]:
    """The quantized modules, by the name that their weight would have.

    Raises:
        CheckpointError: one cannot be read, or the config says that it is not quantized.
    """
    suffix = f".{LAYOUTS[scheme.layout].numbers}"
    found = {}
    for tensor, info in files.infos.items():
        if not tensor.endswith(suffix) or (scheme.layout == "plain" and info.dtype in FLOATS):
            continue
        name = tensor.removesuffix(suffix)
        if scheme.excluded(name):
            raise CheckpointError(
                f"tensor {tensor!r} of type {info.dtype} is quantized, but quantization_config excludes its module"
            )
        found[f"{name}.weight"] = QuantizedModule(name, files, scheme)
    return found


class LogicalTensors(Mapping[str, np.ndarray]):
    """A folder's tensors as if nothing were quantized: a quantized module has one, its dequantized weight.

    Attributes:
        infos: as ``TensorFiles.infos``; a quantized weight is one of F32.
    """

    def __init__(self, files: TensorFiles, modules: Mapping[str, QuantizedModule]):
        self._files, self._modules = files, modules
        hidden = {tensor for module in modules.values() for tensor in module.tensors}
        self.infos = {name: info for name, info in files.infos.items() if name not in hidden}
        self.infos |= {name: TensorInfo("F32", m.shape, 0, 4 * math.prod(m.shape)) for name, m in modules.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._modules[name].dequantized() if name in self._modules else self._files[name]

    def __iter__(self) -> Any:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def unpack_nibbles(q: np.ndarray) -> np.ndarray:
    """``[rows, columns]`` u8 of ``[rows, columns / 2]``, the low nibble first."""
    return np.stack([q & 15, q >> 4], axis=-1).reshape(len(q), -1)


def _take(x: np.ndarray, rows: np.ndarray, axis: int = 0) -> np.ndarray:
    """Some rows of an array; a view where they follow each other."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        part = slice(rows[0], rows[-1] + 1)
        return x[part] if axis == 0 else x[:, part]
    return x[rows] if axis == 0 else x[:, rows]


def _awq_numbers(stored: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``[n, rows]`` u8 of outputs ``rows`` of ``[n, out / 8]`` words."""
    words = _take(stored, np.unique(rows // 8), axis=1).view(np.uint32)
    place = np.searchsorted(np.unique(rows // 8), rows // 8)
    return (words[:, place] >> (4 * AWQ_NIBBLE[rows % 8]).astype(np.uint32) & 15).astype(np.uint8)


def _numbers_along_words(stored: np.ndarray, bits: int) -> np.ndarray:
    """``[n, words * 32 / bits]`` f32 of ``[n, words]`` i32, lowest bits first."""
    numbers = np.ascontiguousarray(stored).view(np.uint8)
    return (unpack_nibbles(numbers) if bits == 4 else numbers).astype(np.float32)
