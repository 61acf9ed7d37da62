"""Our own checkpoint folder: which file has what.

    jaxserve.json             everything but tensors; written last, so a folder that has it is whole
    jaxserve_tokenizer.json   the tokenizer, where the source had one
    source/                   the source's own config.json, tokenizer files and licence, byte for byte
    params/                   an orbax checkpoint of the parameter tree: one zarr array for each canonical parameter
    jaxserve.partial.json, jaxserve.partial.log    of a conversion that has not ended (``unfinished``)

Tensors go through tensorstore, uncompressed (weights hardly compress), in chunks that no split of a sharded axis over
up to 16 devices cuts, where that axis' length allows it: a device reads its own chunks and no others.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore as ts

from jaxserve.checkpoint.errors import CheckpointError

FORMAT, FORMAT_VERSION = "jaxserve-checkpoint", 1
MANIFEST, TOKENIZER = "jaxserve.json", "jaxserve_tokenizer.json"
SOURCE, PARAMS = "source", "params"
ORBAX_METADATA = "_METADATA"

MAX_SHARDS = 16
MAX_CHUNK_BYTES = 32 << 20
MIN_SPLIT_BYTES = 1 << 20  # an array below this is one chunk

ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}  # of tensors in the folder
NUMBER_DTYPES = {"uint8": "|u1", "int8": "|i1", "int32": "<i4", "float8_e4m3fn": "float8_e4m3fn"}  # of quantized ones


class ArrayEntry(NamedTuple):
    """One parameter in ``jaxserve.json``."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ts.dtype(self.dtype).numpy_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.size * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Of every chunk's file: zarr pads those at the edges."""
        return math.prod(self.chunks) * self.itemsize


def read_entry(value: Any) -> ArrayEntry:
    """The entry of what ``ArrayEntry._asdict`` became in JSON. CheckpointError where it is none."""
    try:
        shape, chunks, dtype = tuple(value["shape"]), tuple(value["chunks"]), value["dtype"]
    except (TypeError, KeyError):
        raise CheckpointError(f"{value!r:.60} must have shape, dtype and chunks") from None
    if not isinstance(dtype, str) or dtype not in ZARR_DTYPES | NUMBER_DTYPES:
        raise CheckpointError(f"dtype {dtype!r:.40} is not one of {', '.join(ZARR_DTYPES | NUMBER_DTYPES)}")
    sizes = (*shape, *chunks)
    if len(shape) != len(chunks) or not all(type(n) is int and n > 0 for n in sizes):
        raise CheckpointError(f"shape {shape!r:.60} and chunks {chunks!r:.60} do not fit")
    return ArrayEntry(shape, dtype, chunks)


def chunk_shape(shape: tuple[int, ...], axes: tuple[str | None, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks of a parameter with logical ``axes``: the sharded axis divided, then leading axes until a chunk is small.

    Args:
        shape: of the parameter.
        axes: name of each axis that a mesh may split, else None (``ArraySpec.axes``).
    """
    chunks = list(shape)
    if math.prod(shape) * itemsize >= MIN_SPLIT_BYTES:
        for i, axis in enumerate(axes):
            if axis is not None:
                chunks[i] //= math.gcd(shape[i], MAX_SHARDS)
        while math.prod(chunks) * itemsize > MAX_CHUNK_BYTES and max(chunks) > 1:
            i = next(i for i, n in enumerate(chunks) if n > 1)
            chunks[i] = -(-chunks[i] // 2)
    return tuple(chunks)


def open_array(folder: Path, name: str, entry: ArrayEntry, *, create: bool = False) -> ts.TensorStore:
    """The zarr array of a parameter. Writes reach the disk before their future resolves (``file_io_sync``)."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(folder / PARAMS / name)}/"},
        "metadata": {
            "zarr_format": 2,
            "shape": entry.shape,
            "chunks": entry.chunks,
            "dtype": (ZARR_DTYPES | NUMBER_DTYPES)[entry.dtype],
            "compressor": None,
            "filters": None,
            "fill_value": None,
            "order": "C",
            "dimension_separator": ".",
        },
        "store_data_equal_to_fill_value": True,  # a chunk that is not there is damage, never zeros
        "context": {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": True},
    }
    return ts.open(spec, create=create, delete_existing=create, open=not create).result()


def damage(folder: Path, name: str, entry: ArrayEntry) -> str | None:
    """What is wrong with the files of a parameter, None where all are there in their full size. Reads no tensor."""
    place = folder / PARAMS / name
    try:
        with os.scandir(place) as found:
            sizes = {e.name: e.stat().st_size for e in found if e.name != ".zarray"}
    except OSError as e:
        return f"{place}: cannot be read: {e.strerror or e}"
    if not (place / ".zarray").is_file():
        return f"{place / '.zarray'} is missing"
    for chunk in _chunk_names(entry):
        size = sizes.get(chunk)
        if size is None:
            return f"{place / chunk} is missing"
        if size != entry.chunk_bytes:
            return f"{place / chunk} has {size} bytes, expected {entry.chunk_bytes}"
    return None


def orbax_metadata(names: Iterable[str]) -> str:
    """Orbax's ``_METADATA`` of ``params/``, from which its checkpointers restore the tree: dictionaries by field name,
    ``layers`` a list."""
    tree = {}
    for name in names:
        path = name.split(".")
        keys = [{"key": key, "key_type": 1 if key.isdecimal() else 2} for key in path]  # of a sequence, of a dict
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        tree[str(tuple(path))] = {"key_metadata": keys, "value_metadata": value}
    return json.dumps(
        {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def _chunk_names(entry: ArrayEntry) -> Iterator[str]:
    counts = [-(-n // c) for n, c in zip(entry.shape, entry.chunks)]
    for index in itertools.product(*map(range, counts)):
        yield ".".join(map(str, index))
