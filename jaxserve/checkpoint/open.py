"""One door to every checkpoint format."""

from pathlib import Path

from jaxserve.checkpoint.gguf import GGUFCheckpoint
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.orbax import OrbaxCheckpoint
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.resolve import ORBAX_CONFIG, resolve_model
from jaxserve.checkpoint.unfinished import Progress


def open_checkpoint(
    name_or_path: str | Path, *, allow_bare: bool = False, on_progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint of a known name, a GGUF file, or a folder: one with a GGUF file, a Hugging Face one, or one
    of our own format.

    Args:
        name_or_path: see ``resolve_model``.
        allow_bare: a Hugging Face folder may lack its tensors; what its config says can be read all the same.
        on_progress: of a download from the hub.

    Raises:
        CheckpointError: nothing is found, or what is found cannot be served; one line naming the fault.
    """
    path = resolve_model(name_or_path, on_progress=on_progress)
    if not path.is_dir():
        return GGUFCheckpoint(path)
    if (path / ORBAX_CONFIG).is_file():
        return OrbaxCheckpoint(path)
    return HFCheckpoint(path, allow_bare=allow_bare)
