"""GGUF checkpoints: config, tokenizer and dequantized parameters from one file.

The header is read by ``gguf.header`` (the `gguf` package's reader believes every length it finds, and takes seconds
over a large vocabulary); the `gguf` package knows the block formats. Tensor data stays memory-mapped and is
dequantized in the parts that are read.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf.config import read_config, read_family, read_layout
from jaxserve.checkpoint.gguf.header import BlockType, TensorInfo, read_header
from jaxserve.checkpoint.gguf.layout import Piece, param_shape
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

    def __init__(self, path: str | Path):
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
        """Part ``index`` (one slice with a start and a stop for each axis) of parameter ``name``, in float32; maybe a
        read-only view of the mapped file. Dequantizes the rows of that part alone, and of them the blocks that it
        meets. Threads may call it at once.

        Raises:
            CheckpointError: no such parameter, the file is closed, or its tensor is of a type that cannot be read.
        """
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
        if axis is not None:
            half = piece.shape[axis] // 2
            coordinates[axis] = coordinates[axis] % half * 2 + coordinates[axis] // half
        if len(tensor.shape) == 1:  # its blocks run across the parameter's axes: small, so all of it
            values = self._dequantize(tensor, raw).ravel()[piece.first_row :][: math.prod(piece.shape)]
            return values.reshape(piece.shape)[np.ix_(*coordinates)]
        if piece.rows_apart is not None:
            rows = (coordinates[0][:, None] * piece.rows_apart + coordinates[1]).ravel() + piece.first_row
        else:
            rows = np.ravel_multi_index(np.ix_(*coordinates[:-1]), piece.shape[:-1]).ravel() + piece.first_row
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
