"""Back to the Hugging Face layout: the tensors that a source had, from the parameters they became.

``hf.layout``'s pieces are views: what reads a box of a parameter out of a tensor also writes it into one. Which tensors
there were, of which type and in which file, our own format keeps beside the parameters (``source_tensors``).
Quantized matrices become modules of other tensors (``hf.quantized_writer``).
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hf.config import family_of
from jaxserve.checkpoint.hf.families import HFFamily
from jaxserve.checkpoint.hf.files import INDEX, SINGLE
from jaxserve.checkpoint.hf.layout import Piece, pieces
from jaxserve.checkpoint.hf.quantized_writer import ModuleLayout, Parts, check_module, module_layout
from jaxserve.checkpoint.hf.safetensors_header import numpy_dtype
from jaxserve.checkpoint.json_file import read_json
from jaxserve.checkpoint.mapped import drop_pages_of
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.unfinished import Plan, Progress, check_space, unfinished, write_durably
from jaxserve.config import MatrixFormat, ModelConfig

SOURCE_TENSORS = "tensors.json"
DTYPE_OF = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 4 << 30  # of tensors in a file, where the source's files are not kept
_SHARED = ("k_up", "v_up")  # parameters that share a tensor
_TABLES = ("embed", "positions")  # matrices that are no linear module


class SourceTensor(NamedTuple):
    file: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


def source_tensors(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Tensor -> [file, dtype, shape], in the files' order, of what came from a Hugging Face folder; else None."""
    checkpoint = getattr(checkpoint, "plain", checkpoint)  # of one that is quantized when it is read
    if isinstance(checkpoint, HFCheckpoint):
        files = checkpoint.tensor_files
        if files is None:
            return None
        order = sorted(files.infos, key=lambda name: (files.file_of(name), files.infos[name].start))
        return {name: [files.file_of(name), files.infos[name].dtype, list(files.infos[name].shape)] for name in order}
    folder = getattr(checkpoint, "source_folder", None)
    path = None if folder is None else folder / SOURCE_TENSORS
    return read_json(path) if path is not None and path.is_file() else None


def writable_tensors(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """The tensors that ``write_safetensors`` will write; left out are those that are no parameter (buffers that follow
    from the config, layers that only draft).

    Raises:
        CheckpointError: the checkpoint did not come from a Hugging Face folder, or from one that was quantized.
    """
    found = source_tensors(checkpoint)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path} did not come from a Hugging Face folder, so it cannot be written as safetensors"
        )
    try:
        tensors = {name: SourceTensor(file, dtype, tuple(shape)) for name, (file, dtype, shape) in found.items()}
    except (TypeError, ValueError):
        raise CheckpointError(f"{checkpoint.path}: {SOURCE_TENSORS} is not of tensors") from None
    for name, tensor in tensors.items():
        if tensor.dtype in ("I32", "I64", "I8", "F8_E4M3"):
            raise CheckpointError(
                f"{checkpoint.path} came from a quantized model (tensor {name!r:.80} is of {tensor.dtype}), which can "
                "be written as orbax only"
            )
        if not re.fullmatch(r"[^/\0]+\.safetensors", tensor.file) or tensor.dtype not in (*DTYPE_OF.values(), "F64"):
            raise CheckpointError(f"{checkpoint.path}: {SOURCE_TENSORS}: {name!r:.80} is {tensor!r:.120}")
    inverse = _inverse(checkpoint, tensors)
    return {name: tensor for name, tensor in tensors.items() if name in inverse}


class _Written(NamedTuple):
    """What becomes of one of the source's tensors."""

    parts: Parts
    tensors: dict[str, SourceTensor]
    is_module: bool


def write_safetensors(
    checkpoint: Checkpoint, plan: Plan, source_files: list[Path], folder: Path, on_progress: Progress | None = None
) -> None:
    """Writes the Hugging Face folder that ``checkpoint`` came from: the same files with the same tensors, of the types
    they had (or of ``plan.dtype``), config.json last. With quantized matrices: their modules' tensors, all in the
    parameters' order. A file is whole or not there; finished files are kept when an interrupted run is made again.

    Raises:
        CheckpointError: see ``unfinished.unfinished`` and ``writable_tensors``; no layout has the matrices' format.
    """
    given = writable_tensors(checkpoint)
    if plan.dtype is not None:
        given = {name: t._replace(dtype=DTYPE_OF[plan.dtype]) for name, t in given.items()}
    inverse = _inverse(checkpoint, given)
    formats = {} if checkpoint.config.quantization is None else checkpoint.config.quantization.formats()
    layout, quantization = None, None
    written = {name: _Written(inverse[name], {name: tensor}, False) for name, tensor in given.items()}
    if formats:
        layout = module_layout(formats, checkpoint)
        written = _with_modules({name: written[name] for name in inverse if name in given}, formats, layout)
        head = family_of(read_json(_source_folder(checkpoint) / "config.json")).tensors["head"][0][0].tensor
        quantization = layout.config(_excluded(written, head))
    files: dict[str, list[str]] = {}
    for name, entry in written.items():
        files.setdefault(next(iter(entry.tensors.values())).file, []).append(name)
    done = 0

    def report() -> None:
        if on_progress is not None:
            on_progress("convert", done, len(written))

    def tensors_of(names: list[str]) -> dict[str, SourceTensor]:
        return {n: t for name in names for n, t in written[name].tensors.items()}

    with unfinished(folder, plan) as log:
        finished = {e["file"] for e in log.entries if _size(folder / e["file"]) == e["size"]}
        tensors = tensors_of(list(written))
        check_space(folder, sum(_num_bytes(t) for t in tensors.values() if t.file not in finished))
        for file, names in files.items():
            report()
            if file in finished:
                done += len(names)
                continue
            part = folder / f"{file}.tmp"
            with open(part, "wb") as out:
                out.write(_header(tensors_of(names)))
                for name in names:
                    drop_pages_of(checkpoint)
                    entry = written[name]
                    if entry.is_module:
                        assert layout is not None
                        module, columns = name.removesuffix(".weight"), entry.parts[0][1].shape[1]
                        arrays = layout.arrays(checkpoint, module, entry.parts, columns)
                    else:
                        arrays = {name: _assemble(checkpoint, name, entry.tensors[name], entry.parts)}
                    for tensor in entry.tensors:
                        arrays[tensor].tofile(out)
                    done += 1
                    report()
                out.flush()
                os.fsync(out.fileno())
            size = part.stat().st_size
            part.replace(folder / file)
            log.append({"file": file, "size": size, "tensors": len(names)})
        report()
        _write_rest(tensors, plan, quantization, source_files, folder)


def _with_modules(
    written: Mapping[str, _Written], formats: Mapping[str, MatrixFormat], layout: ModuleLayout
) -> dict[str, _Written]:
    """With quantized modules for the matrices in ``formats``, and files of ``SHARD_BYTES`` in the order given: that of
    the layers, in which calibration makes them."""
    found, shard, size = {}, 0, 0
    for name, entry in written.items():
        tensors, is_module = entry.tensors, check_module(name, entry.parts, formats)
        if is_module:
            stored = layout.tensors(name.removesuffix(".weight"), *tensors[name].shape)
            tensors = {n: SourceTensor("", *t) for n, t in stored.items()}
        num_bytes = sum(map(_num_bytes, tensors.values()))
        if size and size + num_bytes > SHARD_BYTES:
            shard, size = shard + 1, 0
        size += num_bytes
        found[name] = _Written(entry.parts, {n: t._replace(file=str(shard)) for n, t in tensors.items()}, is_module)
    names = [SINGLE] if shard == 0 else [f"model-{i + 1:05}-of-{shard + 1:05}.safetensors" for i in range(shard + 1)]
    return {
        name: entry._replace(tensors={n: t._replace(file=names[int(t.file)]) for n, t in entry.tensors.items()})
        for name, entry in found.items()
    }


def _excluded(written: Mapping[str, _Written], head: str) -> list[str]:
    """The linear modules that are not quantized: the ``head``, also where it is tied, routers and the like."""
    names = [
        name
        for name, entry in written.items()
        if not entry.is_module
        and name.endswith(".weight")
        and len(entry.tensors[name].shape) == 2
        and not any(parameter in _TABLES for parameter, _ in entry.parts)
    ]
    return [name.removesuffix(".weight") for name in dict.fromkeys([*names, head])]


def _write_rest(
    tensors: Mapping[str, SourceTensor],
    plan: Plan,
    quantization: dict[str, Any] | None,
    source_files: list[Path],
    folder: Path,
) -> None:
    """The index, the tokenizer's files and, at the very end, config.json, without which the folder is no model."""
    if {t.file for t in tensors.values()} != {SINGLE}:
        total = sum(_num_bytes(t) for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: t.file for name, t in tensors.items()}}
        write_durably(folder / INDEX, json.dumps(index, indent=2).encode())
    for file in sorted(source_files, key=lambda f: f.name == "config.json"):
        data = file.read_bytes()
        if file.name == "config.json" and (plan.dtype is not None or quantization is not None):
            values = json.loads(data)
            if plan.dtype is not None:
                values |= {key: plan.dtype for key in ("torch_dtype", "dtype") if key in values}
            if quantization is not None:
                values["quantization_config"] = quantization
            data = json.dumps(values, indent=2).encode()
        write_durably(folder / file.name, data)


def _source_folder(checkpoint: Checkpoint) -> Path:
    return getattr(checkpoint, "source_folder", checkpoint.path)


def _inverse(checkpoint: Checkpoint, tensors: Mapping[str, Any]) -> dict[str, Parts]:
    """Tensor -> the parameters that it holds boxes of, each with its piece."""
    family = family_of(read_json(_source_folder(checkpoint) / "config.json"))
    found: dict[str, Parts] = {}
    plain = dataclasses.replace(checkpoint.config, quantization=None)
    for parameter, piece in _all_pieces(family, plain, tensors):
        found.setdefault(piece.tensor, []).append((parameter, piece))
    embedding, head = (family.tensors[name][0][0].tensor for name in ("embed", "head"))
    if checkpoint.config.tie_word_embeddings and head in tensors:  # a copy of the embedding that it is tied to
        prefix = _prefix(family, tensors)
        found[head] = found[embedding.format(p=prefix)]
    return found


def _all_pieces(family: HFFamily, config: ModelConfig, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Piece]]:
    from jaxserve.model.params import named_leaves, param_specs

    shapes = {name: spec.shape for name, spec in named_leaves(param_specs(config))}
    prefix = _prefix(family, tensors)
    for name in shapes:
        *parents, parameter = name.split(".")
        layer = int(parents[1]) if parents else None
        together = _SHARED if parameter in _SHARED else (parameter,)
        around = {p: shapes[n] for p in together if (n := ".".join([*parents, p])) in shapes}
        recipes = family.tensors[parameter]
        exists = (r for r in recipes if r[0].tensor.format(p=prefix, i=layer, e=0) in tensors)
        for piece in pieces(parameter, around, next(exists, recipes[0]), prefix, layer):
            if piece.tensor not in tensors:
                raise CheckpointError(f"{SOURCE_TENSORS} has no tensor {piece.tensor!r}, which is part of {name}")
            yield name, piece


def _prefix(family: HFFamily, tensors: Mapping[str, Any]) -> str:
    embedding = family.tensors["embed"][0][0].tensor
    return next((p for p in family.prefixes if embedding.format(p=p) in tensors), family.prefixes[0])


def _assemble(checkpoint: Checkpoint, name: str, tensor: SourceTensor, parts: Parts) -> np.ndarray:
    """One tensor of the Hugging Face layout, in memory."""
    out = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
    filled = 0
    for parameter, piece in parts:
        if piece.shape != tensor.shape:
            raise CheckpointError(f"tensor {name!r} has shape {tensor.shape}, {parameter} needs {piece.shape}")
        view = piece.view(out)
        if not np.may_share_memory(view, out):
            raise AssertionError(f"{name}: a piece of {parameter} is no view")
        view[...] = checkpoint.read(parameter, piece.box)
        filled += view.size
    if filled != out.size:
        raise CheckpointError(f"tensor {name!r} has {out.size} elements, its parameters give {filled}")
    return out


def _header(tensors: Mapping[str, SourceTensor]) -> bytes:
    """The beginning of a safetensors file of these tensors, one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + _num_bytes(tensor)
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def _num_bytes(tensor: SourceTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * numpy_dtype(tensor.dtype).itemsize


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
