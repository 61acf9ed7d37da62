"""The header of a GGUF file, read with every length checked against the file before it is believed.

A GGUF file is: magic, version, counts; key/value metadata; tensor infos; padding; tensor data. The format is
specified in ggml's ``docs/gguf.md``. Nothing here allocates more than a small multiple of the bytes it has seen, so a
corrupt or hostile file costs no more than an honest one of its size.
"""

import itertools
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # same layout; version 1 had 32-bit counts and is not written any more
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml's GGML_MAX_DIMS

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
    _BOOL: np.dtype("<u1"),
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class BlockType(NamedTuple):
    """A ggml tensor type: ``block_size`` elements of a row are stored in ``num_bytes`` bytes."""

    name: str
    block_size: int
    num_bytes: int


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]  # row-major, the last axis contiguous (the file lists it first)
    type_id: int  # ggml type
    type_name: str
    start: int  # byte offset in the file
    num_bytes: int


class GGUFHeader(NamedTuple):
    version: int
    metadata: dict[str, Any]  # int, float, bool, str; arrays as numpy arrays, of strings as list[str]
    tensors: dict[str, TensorInfo]  # in file order


def read_header(data: memoryview, block_types: Mapping[int, BlockType]) -> GGUFHeader:
    """Metadata and tensor places of the GGUF file whose bytes are ``data``.

    Every tensor is known to lie inside the file, on its own bytes, at its alignment.

    Raises:
        CheckpointError: with the byte offset, and the key or tensor where there is one.
    """
    cursor = _Cursor(data)
    if len(data) == 0:
        raise CheckpointError("the file is empty")
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise CheckpointError(f"not a GGUF file: byte 0 starts {bytes(data[:4])!r}, expected {MAGIC!r}")
    cursor.at = len(MAGIC)
    version = cursor.u32("the version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "a big-endian file" if big_endian else f"GGUF version {version}"
        raise CheckpointError(f"byte 4: {what} is not supported, only little-endian versions {VERSIONS} are")
    num_tensors = cursor.u64("the tensor count")
    num_keys = cursor.u64("the metadata count")
    metadata = _read_metadata(cursor, num_keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment={alignment!r} is not a power of two")
    tensors = _read_tensor_infos(cursor, num_tensors, block_types)
    data_start = -(-cursor.at // alignment) * alignment
    return GGUFHeader(version, metadata, _place_tensors(tensors, data_start, alignment, len(data)))


class _Cursor:
    """A position in the file that never moves past its end."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def take(self, num_bytes: int, what: str) -> int:
        """Offset of the next ``num_bytes``, which are stepped over."""
        start = self.at
        if num_bytes > len(self.data) - start:
            raise CheckpointError(
                f"truncated or corrupt: {what} needs bytes {start}..{start + num_bytes}, the file has {len(self.data)}"
            )
        self.at = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def text(self, what: str) -> str:
        num_bytes = self.u64(what)
        start = self.take(num_bytes, what)
        try:
            return str(self.data[start : start + num_bytes], "utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"byte {start + e.start}: {what} is not UTF-8") from None

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        """Raises unless ``count`` items of at least ``min_bytes`` each can follow."""
        left = len(self.data) - self.at
        if count * min_bytes > left:
            raise CheckpointError(
                f"truncated or corrupt: {count} {what} at byte {self.at} need at least {count * min_bytes} bytes, "
                f"the file has {left} more"
            )


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    cursor.check_count(num_keys, 8 + 4 + 1, "metadata keys")
    metadata: dict[str, Any] = {}
    for i in range(num_keys):
        at = cursor.at
        key = cursor.text(f"metadata key {i}")
        if key in metadata:
            raise CheckpointError(f"byte {at}: metadata key {key!r} appears twice")
        what = f"metadata {key!r}"
        metadata[key] = _read_value(cursor, cursor.u32(f"type of {what}"), what)
    return metadata


def _read_value(cursor: _Cursor, type_id: int, what: str) -> Any:
    if type_id == _STRING:
        return cursor.text(what)
    if type_id == _ARRAY:
        type_id = cursor.u32(f"element type of {what}")
        count = cursor.u64(f"length of {what}")
        if type_id == _STRING:
            cursor.check_count(count, 8, f"strings of {what}")
            return [cursor.text(what) for _ in range(count)]
        array = _read_numbers(cursor, type_id, count, what)
        array.flags.writeable = False
        return array
    return _read_numbers(cursor, type_id, 1, what)[0].item()


def _read_numbers(cursor: _Cursor, type_id: int, count: int, what: str) -> np.ndarray:
    """``[count]``, copied out of the file."""
    dtype = _SCALARS.get(type_id)
    if dtype is None:
        raise CheckpointError(f"before byte {cursor.at}: {what} has unknown or nested value type {type_id}")
    start = cursor.take(count * dtype.itemsize, what)
    array = np.frombuffer(cursor.data, dtype, count, start).copy()
    if type_id == _BOOL:
        if (array > 1).any():
            raise CheckpointError(f"byte {start + int(np.argmax(array > 1))}: {what} is neither true nor false")
        return array.astype(bool)
    return array


def _read_tensor_infos(cursor: _Cursor, count: int, block_types: Mapping[int, BlockType]) -> dict[str, TensorInfo]:
    """Tensor infos by name; ``start`` is still relative to the data section."""
    cursor.check_count(count, 8 + 4 + 4 + 8, "tensor infos")
    tensors: dict[str, TensorInfo] = {}
    for i in range(count):
        at = cursor.at
        name = cursor.text(f"name of tensor {i}")
        if name in tensors:
            raise CheckpointError(f"byte {at}: tensor {name!r} appears twice")
        num_dims = cursor.u32(f"dimensions of tensor {name!r}")
        if not 1 <= num_dims <= MAX_DIMS:
            raise CheckpointError(f"byte {at}: tensor {name!r} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(cursor.u64(f"shape of tensor {name!r}") for _ in range(num_dims))[::-1]
        type_id = cursor.u32(f"type of tensor {name!r}")
        start = cursor.u64(f"offset of tensor {name!r}")
        if type_id not in block_types:
            raise CheckpointError(f"byte {at}: tensor {name!r} has unknown type {type_id}")
        block = block_types[type_id]
        if 0 in shape or shape[-1] % block.block_size:
            raise CheckpointError(
                f"byte {at}: tensor {name!r} of shape {shape} is not made of {block.name} rows of "
                f"{block.block_size}-element blocks"
            )
        num_bytes = math.prod(shape) // block.block_size * block.num_bytes
        tensors[name] = TensorInfo(name, shape, type_id, block.name, start, num_bytes)
    return tensors


def _place_tensors(
    tensors: dict[str, TensorInfo], data_start: int, alignment: int, file_len: int
) -> dict[str, TensorInfo]:
    """The same tensors with ``start`` in the file, checked against its length and against each other."""
    placed: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        start = data_start + tensor.start
        if tensor.start % alignment:
            raise CheckpointError(f"tensor {name!r} starts at byte {start}, not at a multiple of {alignment}")
        if start + tensor.num_bytes > file_len:
            raise CheckpointError(
                f"truncated or corrupt: tensor {name!r} needs bytes {start}..{start + tensor.num_bytes}, "
                f"the file has {file_len}"
            )
        placed[name] = tensor._replace(start=start)
    in_order = sorted(placed.values(), key=lambda t: t.start)
    for before, after in itertools.pairwise(in_order):
        if before.start + before.num_bytes > after.start:
            raise CheckpointError(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.start}")
    return placed
