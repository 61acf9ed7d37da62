"""Writes a checkpoint of our own format, tensor by tensor, so that an interrupted run can go on where it stopped.

``jaxserve.partial.json`` says what is being written; each line of ``jaxserve.partial.log`` is a tensor whose bytes are
on the disk. ``jaxserve.json`` is written last and makes the folder a checkpoint.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tensorstore as ts

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.writer import SOURCE_TENSORS, source_tensors
from jaxserve.checkpoint.mapped import drop_pages_of
from jaxserve.checkpoint.orbax.config_json import config_to_json
from jaxserve.checkpoint.orbax.layout import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NUMBER_DTYPES,
    ORBAX_METADATA,
    PARAMS,
    SOURCE,
    TOKENIZER,
    ZARR_DTYPES,
    ArrayEntry,
    chunk_shape,
    damage,
    open_array,
    orbax_metadata,
    read_entry,
)
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.unfinished import Plan, Progress, check_space, sync_folder, unfinished, write_durably
from jaxserve.text.tokenizer_json import tokenizer_to_json

SLAB_BYTES = 128 << 20  # of float32 that are read at once, where a tensor's first axis can be divided


def write_orbax(
    checkpoint: Checkpoint, plan: Plan, source_files: list[Path], folder: Path, on_progress: Progress | None = None
) -> None:
    """Writes ``checkpoint`` into ``folder``, which is new, empty, or has the beginning of the same plan.

    Raises:
        CheckpointError: the folder has something else, another process writes it, or the disk is full or read-only.
            What is finished by then stays for the next run; the folder is not a checkpoint before all of it is.
    """
    from jaxserve.model.params import named_leaves, param_specs

    specs = dict(named_leaves(param_specs(checkpoint.config)))
    with unfinished(folder, plan) as log:
        done = {entry["name"]: read_entry(entry) for entry in log.entries}
        done = {name: entry for name, entry in done.items() if damage(folder, name, entry) is None}
        left = [(math.prod(s.shape), s.dtype or plan.dtype) for name, s in specs.items() if name not in done]
        # Of a dtype that is not known before a tensor is read, two bytes are sure.
        check_space(folder, sum(n * (2 if t is None else ts.dtype(t).numpy_dtype.itemsize) for n, t in left))
        for name, spec in specs.items():
            if on_progress is not None:
                on_progress("convert", len(done), len(specs))
            if name not in done:
                drop_pages_of(checkpoint)
                done[name] = _write_tensor(checkpoint, folder, name, spec.shape, spec.axes, spec.dtype or plan.dtype)
                log.append({"name": name, **done[name]._asdict()})
        if on_progress is not None:
            on_progress("convert", len(done), len(specs))
        _finish(checkpoint, plan, source_files, folder, {name: done[name] for name in specs})


def _write_tensor(
    source: Checkpoint,
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str | None,
) -> ArrayEntry:
    """Reads one parameter slab by slab along its first axis and writes it. Its bytes are on the disk on return."""
    given = source.read(name, tuple(slice(0, 1) for _ in shape)).dtype.name if dtype is None else dtype
    if given not in ZARR_DTYPES | NUMBER_DTYPES:
        raise CheckpointError(f"parameter {name}: {given} is not one of {', '.join(ZARR_DTYPES | NUMBER_DTYPES)}")
    itemsize = ts.dtype(given).numpy_dtype.itemsize
    entry = ArrayEntry(shape, given, chunk_shape(shape, axes, itemsize))
    with _tensorstore_errors(folder, name):
        array = open_array(folder, name, entry, create=True)
    whole_chunks = entry.chunks[0] * max(1, SLAB_BYTES // (4 * math.prod(shape[1:]) * entry.chunks[0]))
    for start in range(0, shape[0], whole_chunks):
        stop = min(start + whole_chunks, shape[0])
        values = source.read(name, (slice(start, stop), *(slice(0, n) for n in shape[1:])))
        if values.shape != (stop - start, *shape[1:]):
            raise CheckpointError(f"parameter {name}: rows {start}:{stop} of {shape} came in shape {values.shape}")
        if dtype is None and values.dtype.name != given:  # tensors of several types make up the parameter
            return _write_tensor(source, folder, name, shape, axes, "float32")
        values = _cast(name, values, given)
        with _tensorstore_errors(folder, name):
            array[start:stop].write(values, can_reference_source_data_indefinitely=True).result()
    sync_folder(folder / PARAMS / name)
    return entry


def _cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, ts.dtype(dtype).numpy_dtype)
    if dtype == "float16" and values.dtype != cast.dtype and np.isinf(cast).sum() != np.isinf(values).sum():
        raise CheckpointError(f"parameter {name} has values beyond float16's largest, 65504: use bfloat16")
    return cast


def _finish(
    checkpoint: Checkpoint, plan: Plan, source_files: list[Path], folder: Path, done: dict[str, ArrayEntry]
) -> None:
    """Everything but tensors, and ``jaxserve.json`` at the very end."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        write_durably(folder / TOKENIZER, tokenizer_to_json(tokenizer).encode())
    tensors = source_tensors(checkpoint)
    if source_files or tensors:
        (folder / SOURCE).mkdir(exist_ok=True)
    for file in source_files:
        write_durably(folder / SOURCE / file.name, file.read_bytes())
    if tensors:
        write_durably(folder / SOURCE / SOURCE_TENSORS, json.dumps(tensors).encode())
    write_durably(folder / PARAMS / ORBAX_METADATA, orbax_metadata(done).encode())
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": plan.source,
        "converted_to": plan.dtype,
        "model_name": checkpoint.model_name,
        "architecture": checkpoint.architecture,
        "license": checkpoint.license,
        "sampling_defaults": checkpoint.sampling_defaults,
        "has_tokenizer": tokenizer is not None,
        "config": config_to_json(checkpoint.config),
        "params": {name: entry._asdict() for name, entry in done.items()},
    }
    sync_folder(folder / PARAMS)
    write_durably(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


@contextmanager
def _tensorstore_errors(folder: Path, name: str) -> Iterator[None]:
    """The same for what tensorstore says."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as e:
        text = " ".join(str(e).split())
        raise CheckpointError(f"{folder / PARAMS / name}: cannot be written: {text:.400}") from None
