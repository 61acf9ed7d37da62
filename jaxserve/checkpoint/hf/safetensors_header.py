"""The header of a safetensors file, read with every length checked against the file before it is believed.

A safetensors file is: the header's length (u64, little-endian); the header, a JSON object of tensor name to
``{dtype, shape, data_offsets}`` and maybe ``__metadata__``; the tensors' bytes, without gaps. The format is specified
in the safetensors README. Reading costs no more than a small multiple of the header's own bytes, which the file has.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.json_file import MAX_JSON_BYTES, parse_json, shown

MAX_DIMS = 16

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a parameter can be read from: 8 bits and less need scales beside them


class TensorInfo(NamedTuple):
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    num_bytes: int


def read_header(data: memoryview) -> dict[str, TensorInfo]:
    """Place, type and shape of every tensor of the safetensors file whose bytes are ``data``.

    Every tensor is known to lie inside the file, on its own bytes, and all bytes of the file to belong to one.

    Raises:
        CheckpointError: with the tensor and both numbers.
    """
    if len(data) < 8:
        raise CheckpointError(f"truncated or corrupt: the header's length needs 8 bytes, the file has {len(data)}")
    header_len = int.from_bytes(data[:8], "little")
    if header_len > MAX_JSON_BYTES:
        raise CheckpointError(f"not a safetensors file, or corrupt: a header of {header_len} bytes is not believed")
    data_start = 8 + header_len
    if data_start > len(data):
        raise CheckpointError(
            f"truncated or corrupt: the header needs bytes 8..{data_start}, the file has {len(data)}"
        )  # fmt: skip
    header = parse_json(bytes(data[8:data_start]), "the header")
    header.pop("__metadata__", None)  # free text of whoever wrote the file
    tensors = {name: _tensor_info(name, entry, data_start, len(data)) for name, entry in header.items()}
    _check_no_gaps(tensors, data_start, len(data))
    return tensors


def view_tensor(data: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """The tensor in its own shape and float type: a view of ``data`` (u8), which is the whole file."""
    return np.frombuffer(data, numpy_dtype(tensor.dtype), math.prod(tensor.shape), tensor.start).reshape(tensor.shape)


def numpy_dtype(dtype: str) -> np.dtype:
    """Of one of ``FLOATS``, or of the numbers of a quantized matrix."""
    if dtype in ("BF16", "F8_E4M3"):
        import jax.numpy as jnp  # numpy has none of its own

        return np.dtype(jnp.bfloat16 if dtype == "BF16" else jnp.float8_e4m3fn)
    return np.dtype(_NUMPY[dtype])


def _tensor_info(name: str, entry: Any, data_start: int, file_len: int) -> TensorInfo:
    what = f"tensor {shown(name, 120)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} is {shown(entry)}, expected its dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{what} has unknown dtype {shown(dtype)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{what} has shape {shown(shape)}, expected at most {MAX_DIMS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has data_offsets {shown(offsets)}, expected a start and an end")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_len:
        raise CheckpointError(
            f"truncated or corrupt: {what} needs bytes {shown(start)}..{shown(end)}, the file has {file_len}"
        )
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != 8 * (end - start):
        raise CheckpointError(
            f"{what} of shape {shown(shape)} in {dtype} needs {shown(-(-num_bits // 8))} bytes, it has {end - start}"
        )
    return TensorInfo(dtype, tuple(shape), start, end - start)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_no_gaps(tensors: dict[str, TensorInfo], data_start: int, file_len: int) -> None:
    at, before = data_start, None
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start < at:
            raise CheckpointError(f"tensors {shown(before, 120)} and {shown(name, 120)} overlap at byte {tensor.start}")
        if tensor.start > at:
            raise CheckpointError(f"bytes {at}..{tensor.start} before tensor {shown(name, 120)} belong to no tensor")
        at, before = tensor.start + tensor.num_bytes, name
    if at != file_len:
        raise CheckpointError(f"the tensors end at byte {at}, the file has {file_len}")
