"""From any checkpoint to our own format, and from there back to the Hugging Face layout."""

import hashlib
import json
from pathlib import Path

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.writer import writable_tensors, write_safetensors
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.checkpoint.orbax.layout import MANIFEST, ZARR_DTYPES
from jaxserve.checkpoint.orbax.writer import write_orbax
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.unfinished import Plan, Progress

TENSOR_SUFFIXES = (".safetensors", ".gguf", ".bin", ".json")  # whose size and time identify a source
KEPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)  # of a Hugging Face folder, copied as they are


def convert(
    src: str | Path | Checkpoint,
    dst: str | Path,
    *,
    dtype: str | None = None,
    quantization: str = "auto",
    format: str = "orbax",
    on_progress: Progress | None = None,
) -> Path:
    """Writes the checkpoint ``src`` into the folder ``dst``, one tensor in memory at a time, and returns ``dst``.

    A run that was interrupted, by whatever, continues where it stopped when it is made again; until it has ended the
    folder is no checkpoint. Where ``dst`` already is what was asked, nothing is written.

    Args:
        src: whatever ``open_checkpoint`` takes, or an open checkpoint.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own, which for dequantized tensors is float32.
            Matrices that stay quantized keep their types.
        quantization: see ``open_checkpoint``; of a path only.
        format: "orbax" is our own; "safetensors" gives back the Hugging Face folder that the source is or came from,
            tensor for tensor.
        on_progress: called with ("convert", tensors done, tensors in all), before that with what a download says.

    Raises:
        CheckpointError: the source is wrong; ``dst`` holds something else (what is there, what was asked); the disk is
            full or cannot be written.
    """
    if dtype is not None and dtype not in ZARR_DTYPES:
        raise CheckpointError(f"dtype={dtype!r:.40} is not one of {', '.join(ZARR_DTYPES)}")
    if format not in FORMATS:
        raise CheckpointError(f"format={format!r:.40} is not one of {', '.join(FORMATS)}")
    dst = Path(dst).expanduser()
    if isinstance(src, (str, Path)):
        from jaxserve.checkpoint.open import open_checkpoint

        with open_checkpoint(src, quantization=quantization, on_progress=on_progress) as checkpoint:
            FORMATS[format](checkpoint, dst, dtype, on_progress)
    elif quantization != "auto":
        raise CheckpointError(f"quantization={quantization!r}: {src.path} is open already, as it was asked for then")
    else:
        FORMATS[format](src, dst, dtype, on_progress)
    return dst


def _to_orbax(checkpoint: Checkpoint, dst: Path, dtype: str | None, on_progress: Progress | None) -> None:
    from jaxserve.model.params import named_leaves, param_specs

    plan = Plan(
        source=source_digest(checkpoint),
        model_name=checkpoint.model_name,
        architecture=checkpoint.architecture,
        dtype=dtype,
        num_tensors=sum(1 for _ in named_leaves(param_specs(checkpoint.config))),
    )
    if (dst / MANIFEST).exists():
        _check_same(plan, dst)
        if on_progress is not None:
            on_progress("convert", plan.num_tensors, plan.num_tensors)
        return
    write_orbax(checkpoint, plan, kept_files(checkpoint), dst, on_progress)


def _to_safetensors(checkpoint: Checkpoint, dst: Path, dtype: str | None, on_progress: Progress | None) -> None:
    if dtype is None:
        dtype = getattr(checkpoint, "converted_to", None)  # of our own format
    plan = Plan(
        source=source_digest(checkpoint),
        model_name=checkpoint.model_name,
        architecture=checkpoint.architecture,
        dtype=dtype,
        num_tensors=len(writable_tensors(checkpoint)),
        format="safetensors",
    )
    write_safetensors(checkpoint, plan, kept_files(checkpoint), dst, on_progress)


FORMATS = {"orbax": _to_orbax, "safetensors": _to_safetensors}


def _check_same(plan: Plan, dst: Path) -> None:
    """Raises unless the whole checkpoint ``dst`` is what the plan would write."""
    with OrbaxCheckpoint(dst) as there:
        if (there.source, there.converted_to) == (plan.source, plan.dtype):
            return
        what = f"{there.model_name} ({there.architecture}, {'/'.join(there.tensor_types())})"
        other = " from other files" if there.source != plan.source and there.model_name == plan.model_name else ""
        raise CheckpointError(
            f"{dst} has the checkpoint {what}{other}; asked was {plan}: remove it or give another folder"
        )


def source_digest(checkpoint: Checkpoint) -> str:
    """Identifies a source: the names, sizes and times of its files, and what it says of itself."""
    path = checkpoint.path
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in TENSOR_SUFFIXES)
    facts = [checkpoint.model_name, checkpoint.architecture, checkpoint.num_bytes, checkpoint.num_params]
    if checkpoint.config.quantization is not None:  # kept, which makes another folder than dequantized
        facts.append(checkpoint.config.quantization.method)
    if recipe := getattr(checkpoint, "recipe", None):  # of what is quantized on the way
        facts.append(recipe)
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    return hashlib.sha256(json.dumps([facts, stats]).encode()).hexdigest()


def kept_files(checkpoint: Checkpoint) -> list[Path]:
    """Files of the source that are no tensors and are worth keeping as they are."""
    folder = getattr(checkpoint, "source_folder", checkpoint.path)
    return [folder / name for name in KEPT_FILES if (folder / name).is_file()]
