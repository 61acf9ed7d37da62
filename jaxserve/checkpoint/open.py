"""One door to every checkpoint format."""

from pathlib import Path

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf import GGUFCheckpoint
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.resolve import ORBAX_CONFIG, resolve_model
from jaxserve.checkpoint.unfinished import Progress


def open_checkpoint(
    name_or_path: str | Path,
    *,
    quantization: str = "auto",
    allow_bare: bool = False,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """The checkpoint of a known name, a GGUF file, or a folder: one with a GGUF file, a Hugging Face one, or one
    of our own format.

    Args:
        name_or_path: see ``resolve_model``.
        quantization: "auto" keeps matrices of few bits as they are, but those of a GGUF file, which are dequantized
            (CPUs are faster so: benchmarks/notes/quantized_cpu.md); "none" dequantizes all; a method's name (gguf,
            gptq, awq, fp8, compressed-tensors) keeps them, and says that they are of no other.
        allow_bare: a Hugging Face folder may lack its tensors; what its config says can be read all the same.
        on_progress: of a download from the hub.

    Raises:
        CheckpointError: nothing is found, or what is found cannot be served; one line naming the fault.
    """
    path = resolve_model(name_or_path, on_progress=on_progress)
    kept = "none" if quantization == "none" else "auto"
    if not path.is_dir():
        checkpoint: Checkpoint = GGUFCheckpoint(path, quantized="kept" if quantization == "gguf" else "dequantized")
    elif (path / ORBAX_CONFIG).is_file():
        checkpoint = OrbaxCheckpoint(path, quantization=kept)
    else:
        checkpoint = HFCheckpoint(path, allow_bare=allow_bare, quantization=kept)
    found = checkpoint.config.quantization
    if quantization not in ("auto", "none", found and found.method):
        checkpoint.close()
        its = "is not quantized so that it could be kept" if found is None else f"is quantized with {found.method}"
        raise CheckpointError(f"quantization={quantization!r}: {path} {its}")
    return checkpoint
