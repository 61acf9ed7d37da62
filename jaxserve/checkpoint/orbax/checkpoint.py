"""Our own checkpoints: a folder with an orbax checkpoint of the canonical parameters (``orbax.layout`` has its files).

Reading goes through tensorstore, chunk by chunk: a shard costs its own bytes, whatever mesh wrote or reads it.
"""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import tensorstore as ts

from jaxserve.checkpoint.dequantize import DequantizedSource
from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.orbax.config_json import config_from_json
from jaxserve.checkpoint.orbax.layout import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SOURCE,
    TOKENIZER,
    ZARR_DTYPES,
    ArrayEntry,
    damage,
    open_array,
    read_entry,
)
from jaxserve.checkpoint.unfinished import check_whole
from jaxserve.config import ModelConfig
from jaxserve.text.tokenizer import Tokenizer, TokenizerError
from jaxserve.text.tokenizer_json import tokenizer_from_json

_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "format_version": (int,),
    "source": (str,),
    "converted_to": (str, type(None)),
    "model_name": (str,),
    "architecture": (str,),
    "license": (str, type(None)),
    "sampling_defaults": (dict,),
    "config": (dict,),
    "params": (dict,),
    "has_tokenizer": (bool,),
}  # of jaxserve.json


class OrbaxCheckpoint:
    """An open checkpoint of our own format (``checkpoint.protocol.Checkpoint``), whole and with all its files.

    Quantized matrices are dequantized when they are read where ``quantization`` is "none".

    Attributes:
        source, converted_to: what it was made from (``convert.source_digest``) and the dtype asked for, maybe None.
        entries: shape, dtype and chunks of every parameter, in the order of ``param_specs``.
        source_folder: the source's own config.json and tokenizer files; maybe empty.

    Raises:
        CheckpointError: it is not whole (with how many tensors of how many are there), from a newer version, or
            damaged: names the file, field or parameter.
    """

    def __init__(self, path: str | Path, *, quantization: Literal["auto", "none"] = "auto"):
        from jaxserve.model.params import num_params  # imports jax

        self.path = Path(path)
        manifest = _read_manifest(self.path)
        try:
            self.config: ModelConfig = config_from_json(manifest["config"])
            self.entries = _read_entries(manifest["params"], self.config)
        except CheckpointError as e:
            raise CheckpointError(f"{self.path / MANIFEST}: {e}") from None
        for name, entry in self.entries.items():
            if problem := damage(self.path, name, entry):
                raise CheckpointError(f"parameter {name}: {problem}")
        self.source: str = manifest["source"]
        self.converted_to: str | None = manifest["converted_to"]
        self.architecture: str = manifest["architecture"]
        self.model_name: str = manifest["model_name"]
        self.license: str | None = manifest["license"]
        self.sampling_defaults: dict[str, Any] = manifest["sampling_defaults"]
        self.num_bytes = sum(e.num_bytes for e in self.entries.values())
        self.num_params = num_params(self.config)
        self.source_folder = self.path / SOURCE
        self._has_tokenizer: bool = manifest["has_tokenizer"]
        self._arrays: dict[str, ts.TensorStore] = {}
        self._lock = threading.Lock()  # guards _arrays
        self._closed = False
        self._plain: DequantizedSource | None = None
        if quantization == "none" and self.config.quantization is not None:
            self._plain = DequantizedSource(self._read, self.config)
            self.config = self._plain.config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """No more reads; what the attributes say stays readable."""
        self._closed = True
        with self._lock:
            self._arrays.clear()

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer and chat template; None where the source had none."""
        if not self._has_tokenizer:
            return None
        path = self.path / TOKENIZER
        try:
            tokenizer = tokenizer_from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, TokenizerError) as e:
            raise CheckpointError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
        return tokenizer

    def tensor_types(self) -> dict[str, int]:
        """Bytes of tensor data by dtype, most first."""
        num_bytes: Counter[str] = Counter()
        for entry in self.entries.values():
            num_bytes[entry.dtype] += entry.num_bytes
        return dict(num_bytes.most_common())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` of parameter ``name`` in the folder's dtype. Reads the chunks it touches; any thread."""
        return self._read(name, index) if self._plain is None else self._plain.read(name, index)

    def _read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._array(name)[index].read(order="C").result()
        except (ValueError, OSError, RuntimeError) as e:  # tensorstore's own: I/O errors, files changed since
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: parameter {name}: {' '.join(str(e).split()):.300}") from None

    def _array(self, name: str) -> ts.TensorStore:
        if self._closed:
            raise CheckpointError(f"{self.path} is closed")
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no parameter {name!r}")
        with self._lock:
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = open_array(self.path, name, self.entries[name])
            return array


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        check_whole(folder)
        raise CheckpointError(f"{folder} is not a jaxserve checkpoint: it has no {MANIFEST}") from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of a jaxserve checkpoint: its format is not {FORMAT!r}")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r:.40}, this version of jaxserve reads {FORMAT_VERSION}"
        )
    for name in manifest.keys() - _FIELDS.keys():
        raise CheckpointError(f"{path}: {name!r:.60} is not known to this version of jaxserve")
    for name, kinds in _FIELDS.items():
        if type(manifest.get(name, kinds)) not in kinds:
            expected = " or ".join(k.__name__ for k in kinds)
            raise CheckpointError(f"{path}: {name} is {manifest.get(name)!r:.40}, expected {expected}")
    return manifest


def _read_entries(values: dict[str, Any], config: ModelConfig) -> dict[str, ArrayEntry]:
    """The entries, checked against the parameters that ``config`` asks for."""
    from jaxserve.model.params import named_leaves, param_specs

    entries: dict[str, ArrayEntry] = {}
    if config.num_layers > len(values):  # before a tree of so many layers is made
        raise CheckpointError(f"config.num_layers={config.num_layers}, but there are only {len(values)} parameters")
    for name, spec in named_leaves(param_specs(config)):
        if name not in values:
            raise CheckpointError(f"parameter {name} is missing, expected shape {spec.shape}")
        try:
            entry = read_entry(values[name])
        except CheckpointError as e:
            raise CheckpointError(f"parameter {name}: {e}") from None
        if entry.shape != spec.shape:
            raise CheckpointError(f"parameter {name} has shape {entry.shape}, expected {spec.shape}")
        if entry.dtype != spec.dtype and (spec.dtype is not None or entry.dtype not in ZARR_DTYPES):
            raise CheckpointError(f"parameter {name} is of {entry.dtype}, expected {spec.dtype or 'a float type'}")
        entries[name] = entry
    for name in values.keys() - entries.keys():
        raise CheckpointError(f"parameter {name!r:.60} is not a parameter of this model")
    return entries
