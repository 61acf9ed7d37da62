"""GGUF checkpoints: config, tokenizer and dequantized parameters from one file.

The header is read by ``gguf_header`` (the `gguf` package's reader believes every length it finds, and takes seconds
over a large vocabulary); the `gguf` package knows the block formats. Tensor data stays memory-mapped and is
dequantized one tensor at a time.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.families import layer_tensor
from jaxserve.checkpoint.gguf_config import check_tensors, read_config, read_family
from jaxserve.checkpoint.gguf_header import BlockType, TensorInfo, read_header
from jaxserve.text.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

if TYPE_CHECKING:
    from jaxserve.model.params import LayerParams, Params


class GGUFCheckpoint:
    """An open GGUF file whose header, config and tensor shapes have been checked. Close it, or use it as a context.

    Attributes:
        path: the file.
        config: the model's sizes and flags.
        architecture: ``general.architecture``.
        model_name: ``general.name``, else the file's name.
        license: ``general.license`` or None.
        num_bytes: size of the file.
        num_params: elements of all tensors.
        sampling_defaults: none, the format has no place for them.
        metadata: every key of the file.
        tensors: every tensor's place, type and row-major shape.

    Raises:
        CheckpointError: one line naming the file and the byte, key or tensor at fault.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        block_types = _block_types(self.path)
        self._data: np.ndarray | None = _map_file(self.path)
        self.num_bytes = self._data.size
        try:
            header = read_header(memoryview(self._data), block_types)  # type: ignore[arg-type]
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: dict[str, TensorInfo] = header.tensors
            self._family = read_family(header)
            self.config = read_config(self._family, header)
            check_tensors(self._family, self.config, header)
        except CheckpointError as e:
            self.close()
            raise CheckpointError(f"{self.path}: {e}") from None
        self.architecture = self._family.architecture
        self.model_name = _text(self.metadata, "general.name") or self.path.stem
        self.license = _text(self.metadata, "general.license")
        self.num_params = sum(math.prod(t.shape) for t in self.tensors.values())
        self.sampling_defaults: dict[str, Any] = {}

    def __enter__(self) -> "GGUFCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file; config and metadata stay readable."""
        self._data = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template of the metadata."""
        try:
            tokenizer = tokenizer_from_gguf(self.metadata)
        except TokenizerError as e:
            raise CheckpointError(f"{self.path}: {e}") from None
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the embedding only {self.config.vocab_size} rows"
            )
        return tokenizer

    def tensor_types(self) -> dict[str, int]:
        """Bytes of tensor data by ggml type, most first."""
        num_bytes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            num_bytes[tensor.type_name] += tensor.num_bytes
        return dict(num_bytes.most_common())

    def load_tensor(self, name: str) -> np.ndarray:
        """One tensor, dequantized: float32 in the file's row order, maybe a read-only view of the mapped file."""
        import gguf

        tensor = self.tensors[name]
        if self._data is None:
            raise CheckpointError(f"{self.path} is closed")
        raw = self._data[tensor.start : tensor.start + tensor.num_bytes].reshape(*tensor.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # a block scale may be inf or NaN: the values say so
                values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.type_id))
        except NotImplementedError:
            raise CheckpointError(f"{self.path}: tensor {name!r} of type {tensor.type_name} cannot be read") from None
        return values.reshape(tensor.shape)

    def load_params(
        self, dtype: npt.DTypeLike = np.float32, on_tensor: Callable[[int, int], None] | None = None
    ) -> "Params":
        """The parameter tree in the canonical layout of ``model.params``: numpy arrays of ``dtype``.

        ``on_tensor(done, total)`` is called after each tensor of the file.
        """
        from jaxserve.model.params import LayerParams, Params

        family, config, total, done = self._family, self.config, len(self.tensors), 0
        per_kv_head = (config.num_kv_heads, -1, config.head_dim, config.hidden_size)  # [K, heads of one kv head, H, D]

        def load(name: str) -> np.ndarray:
            nonlocal done
            values = np.array(self.load_tensor(name), dtype)
            done += 1
            if on_tensor is not None:
                on_tensor(done, total)
            return values

        def load_layer(i: int) -> "LayerParams":
            tensors = {parameter: load(layer_tensor(family, i, parameter)) for parameter in family.layer}
            if family.interleaved_rope:
                for parameter in ("q", "k"):
                    tensors[parameter] = half_split_rows(tensors[parameter], config.head_dim)
            return LayerParams(
                attn_norm=tensors["attn_norm"],
                qkv=np.concatenate([tensors[parameter].reshape(per_kv_head) for parameter in "qkv"], axis=1),
                attn_out=tensors["attn_out"],
                mlp_norm=tensors["mlp_norm"],
                gate_up=np.stack([tensors["gate"], tensors["up"]]),
                down=tensors["down"],
            )

        return Params(
            embed=load(family.top["embed"]),
            layers=tuple(load_layer(i) for i in range(config.num_layers)),
            final_norm=load(family.top["final_norm"]),
            head=None if config.tie_word_embeddings else load(family.top["head"]),
        )


def half_split_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows ``[heads * H, D]`` with rotary pairs (2i, 2i + 1) in each head, reordered to pairs (i, i + H/2).

    GGUF stores llama-architecture q and k for ggml's interleaved rotary convention; this undoes it.
    """
    d = rows.shape[-1]
    return rows.reshape(-1, head_dim // 2, 2, d).swapaxes(1, 2).reshape(-1, d)


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


def _text(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) and value else None
