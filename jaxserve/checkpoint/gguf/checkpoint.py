"""GGUF checkpoints: config, tokenizer and parameters from one file, dequantized or as they are.

The header is read by ``gguf.header`` (the `gguf` package's reader believes every length it finds, and takes seconds
over a large vocabulary); the `gguf` package knows the block formats. Tensor data stays memory-mapped and is
dequantized in the parts that are read.
"""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf.config import read_config, read_family, read_layout
from jaxserve.checkpoint.gguf.header import BlockType, TensorInfo, read_header
from jaxserve.checkpoint.gguf.layout import Piece, param_shape
from jaxserve.checkpoint.gguf.quantized import BLOCK, leaf_of_blocks, quantization
from jaxserve.checkpoint.mapped import drop_pages
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

CHUNK_ELEMENTS = 2**18  # dequantized at once: temporaries stay in the cache, and small beside a tensor
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # metadata key after "general.sampling." -> field of ``SamplingParams``


class GGUFCheckpoint:
    """An open GGUF file whose header, config and tensor shapes have been checked. Close it, or use it as a context.

    Where ``quantized`` is "kept", matrices of the types ``gguf.quantized.KEPT`` stay as they are
    (``config.quantization`` has their formats); all others are dequantized when they are read.

    Attributes:
        path: the file.
        config: the model's sizes and flags.
        architecture: ``general.architecture``.
        model_name: ``general.name``, else the file's name.
        license: ``general.license`` or None.
        num_bytes: size of the file.
        num_params: elements of all parameters; a tied embedding counts once.
        sampling_defaults: fields of ``SamplingParams`` that ``general.sampling.*`` recommends; samplers without a
            field there are left out.
        metadata: every key of the file.
        tensors: every tensor's place, type and row-major shape.

    Raises:
        CheckpointError: one line naming the file and the byte, key or tensor at fault.
    """

    def __init__(self, path: str | Path, *, quantized: Literal["dequantized", "kept"] = "dequantized"):
        self.path = Path(path)
        self._block_types = _block_types(self.path)
        self._data: np.ndarray | None = _map_file(self.path)
        self.num_bytes = self._data.size
        try:
            header = read_header(memoryview(self._data), self._block_types)  # type: ignore[arg-type]
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: dict[str, TensorInfo] = header.tensors
            family = read_family(header)
            self.config = read_config(family, header, lambda name: self.load_tensor(name).ravel())
            self._layout = read_layout(family, self.config, header)
        except CheckpointError as e:
            self.close()
            text = str(e)
            raise CheckpointError(text if text.startswith(f"{self.path}: ") else f"{self.path}: {text}") from None
        self._formats = {}
        if quantized == "kept" and (found := quantization(self._layout, self.tensors)) is not None:
            self.config, self._formats = dataclasses.replace(self.config, quantization=found), found.formats()
        self.architecture = family.architecture
        self.num_params = sum(math.prod(p.shape) for pieces in self._layout.values() for p in pieces)
        self.sampling_defaults = _sampling_defaults(self.metadata)
        self.model_name = _text(self.metadata, "general.name") or self.path.stem
        self.license = _text(self.metadata, "general.license")

    def __enter__(self) -> "GGUFCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file; config and metadata stay readable."""
        self._data = None

    def drop_pages(self) -> None:
        """See ``mapped.drop_pages``."""
        drop_pages(self._data)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template of the metadata."""
        try:
            tokenizer = tokenizer_from_gguf(self.metadata)
        except TokenizerError as e:
            raise CheckpointError(f"{self.path}: {e}") from None
        return tokenizer

    def tensor_types(self) -> dict[str, int]:
        """Bytes of tensor data by ggml type, most first."""
        num_bytes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            num_bytes[tensor.type_name] += tensor.num_bytes
        return dict(num_bytes.most_common())

    def load_tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32 in the file's row order, maybe a read-only view of the mapped file."""
        return self._dequantize(self.tensors[name], self._raw_rows(self.tensors[name])).reshape(
            self.tensors[name].shape
        )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` (one slice with a start and a stop for each axis) of parameter ``name``, in float32 (of a
        quantized one in the leaf's own type); maybe a read-only view of the mapped file. Dequantizes the rows of that
        part alone, and of them the blocks that it meets. Threads may call it at once.

        Raises:
            CheckpointError: no such parameter, the file is closed, or its tensor is of a type that cannot be read.
        """
        matrix, _, leaf = name.rpartition(".")
        if matrix in self._formats:
            return self._read_leaf(matrix, leaf, index)
        if name not in self._layout:
            raise CheckpointError(f"{self.path}: no parameter {name!r}")
        pieces = self._layout[name]
        shape = param_shape(pieces)
        if len(index) != len(shape):
            raise CheckpointError(f"{self.path}: parameter {name!r} of shape {shape} read with {len(index)} slices")
        box = [range(n)[s] for n, s in zip(shape, index)]
        out = np.empty([len(r) for r in box], np.float32)  # costs no memory until it is written
        for piece in pieces:
            part = [_overlap(r, at, n) for r, at, n in zip(box, piece.start, piece.shape)]
            if not all(part):
                continue
            values = self._read_piece(piece, [range(r.start - at, r.stop - at) for r, at in zip(part, piece.start)])
            if part == box:
                return values
            out[tuple(slice(r.start - b.start, r.stop - b.start) for r, b in zip(part, box))] = values
        return out

    def _read_leaf(self, name: str, leaf: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` of the array ``leaf`` of a quantized parameter."""
        pieces, kind = self._layout[name], self._formats[name].kind
        per_block = 1 if leaf != "q" else BLOCK // 2 if kind == "int4" else BLOCK
        columns = range(*index[-1].indices(param_shape(pieces)[-1]))
        first, last = columns.start // per_block, -(-columns.stop // per_block)
        box = [range(n)[s] for n, s in zip(param_shape(pieces), index[:-1])]
        out: np.ndarray | None = None
        for piece in pieces:
            part = [_overlap(r, at, n) for r, at, n in zip(box, piece.start, piece.shape)]
            if not all(part):
                continue
            tensor = self.tensors[piece.tensor]
            inside = [range(r.start - at, r.stop - at) for r, at in zip(part, piece.start)]
            rows = self._rows(piece, [np.arange(r.start, r.stop) for r in (*inside, range(0))])
            raw = self._raw_rows(tensor).reshape(
                -1, tensor.shape[-1] // BLOCK, self._block_types[tensor.type_id].num_bytes
            )
            step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
            found = [
                leaf_of_blocks(leaf, tensor.type_name, raw[rows[i : i + step], first:last])
                for i in range(0, len(rows), step)
            ]
            values = np.concatenate(found)[:, columns.start - first * per_block :][:, : len(columns)]
            if out is None:
                out = np.empty([*map(len, box), len(columns)], values.dtype)
            where = tuple(slice(r.start - b.start, r.stop - b.start) for r, b in zip(part, box))
            out[where] = values.reshape(*map(len, part), len(columns))
        if out is None:
            raise CheckpointError(f"{self.path}: parameter {name!r} has no part {index}")
        return out

    def _rows(self, piece: Piece, coordinates: list[np.ndarray]) -> np.ndarray:
        """Rows of a piece's tensor at the given places of all axes of the piece but the last."""
        axis = piece.interleaved_axis
        if axis is not None:
            coordinates[axis] = _interleaved(coordinates[axis], piece.shape[axis])
        if piece.rows_apart is not None:
            return (coordinates[0][:, None] * piece.rows_apart + coordinates[1]).ravel() + piece.first_row
        return np.ravel_multi_index(np.ix_(*coordinates[:-1]), piece.shape[:-1]).ravel() + piece.first_row

    def _raw_rows(self, tensor: TensorInfo) -> np.ndarray:
        """A tensor's rows as they are stored: ``[rows, bytes of a row]`` u8."""
        data = self._data
        if data is None:
            raise CheckpointError(f"{self.path} is closed")
        return data[tensor.start : tensor.start + tensor.num_bytes].reshape(math.prod(tensor.shape[:-1]), -1)

    def _dequantize(self, tensor: TensorInfo, raw: np.ndarray) -> np.ndarray:
        """Whole blocks of ``tensor``: ``[rows, bytes]`` u8 to ``[rows, elements]`` f32, a view if it is f32 already."""
        import gguf

        kind, block = gguf.GGMLQuantizationType(tensor.type_id), self._block_types[tensor.type_id]
        if kind == gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32)
        stored, step = raw.reshape(-1, block.num_bytes), max(1, CHUNK_ELEMENTS // block.block_size)
        values = np.empty((len(stored), block.block_size), np.float32)
        try:
            with np.errstate(all="ignore"):  # a block scale may be inf or NaN: the values say so
                for i in range(0, len(stored), step):  # gguf itself goes 16 rows at a time, too few of narrow ones
                    chunk = gguf.quants.dequantize(stored[i : i + step].reshape(1, -1), kind)
                    values[i : i + step] = chunk.reshape(-1, block.block_size)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} of type {tensor.type_name} cannot be read"
            ) from None
        return values.reshape(len(raw), -1)

    def _read_piece(self, piece: Piece, part: list[range]) -> np.ndarray:
        """Part ``part`` of a piece's box."""
        if piece.is_transposed:
            *outer, rows, columns = piece.shape
            stored = piece._replace(shape=(*outer, columns, rows), is_transposed=False)
            return self._read_piece(stored, [*part[:-2], part[-1], part[-2]]).swapaxes(-1, -2)
        tensor, axis = self.tensors[piece.tensor], piece.interleaved_axis
        raw = self._raw_rows(tensor)
        coordinates = [np.arange(r.start, r.stop) for r in part]
        if len(tensor.shape) == 1:  # its blocks run across the parameter's axes: small, so all of it
            if axis is not None:
                coordinates[axis] = _interleaved(coordinates[axis], piece.shape[axis])
            values = self._dequantize(tensor, raw).ravel()[piece.first_row :][: math.prod(piece.shape)]
            return values.reshape(piece.shape)[np.ix_(*coordinates)]
        rows = self._rows(piece, coordinates)
        block = self._block_types[tensor.type_id]
        first = part[-1].start // block.block_size
        last = -(-part[-1].stop // block.block_size)
        columns = slice(first * block.num_bytes, last * block.num_bytes)
        if len(rows) and axis is None and rows[-1] - rows[0] + 1 == len(rows):  # ascending, so without a gap
            raw = raw[rows[0] : rows[-1] + 1, columns]
        else:
            raw = raw[rows, columns]
        offset = first * block.block_size
        values = self._dequantize(tensor, raw)[:, part[-1].start - offset : part[-1].stop - offset]
        return values.reshape([len(r) for r in part])


def _interleaved(places: np.ndarray, size: int) -> np.ndarray:
    """Where elements of halves are, which the tensor has side by side."""
    return places % (size // 2) * 2 + places // (size // 2)


def _overlap(part: range, start: int, size: int) -> range:
    """Where ``part`` meets ``size`` indices from ``start``; empty where they do not."""
    return range(max(part.start, start), min(part.stop, start + size))


def _block_types(path: Path) -> dict[int, BlockType]:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: reading a GGUF file needs the gguf package: pip install gguf") from None
    return {int(t): BlockType(t.name, *sizes) for t, sizes in gguf.GGML_QUANT_SIZES.items()}


def _map_file(path: Path) -> np.ndarray:
    """The file's bytes ``[num_bytes]`` u8, memory-mapped."""
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a GGUF file")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        return np.memmap(path, np.uint8, mode="r")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None


def _sampling_defaults(metadata: dict[str, Any]) -> dict[str, Any]:
    values = {name: metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def _text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
