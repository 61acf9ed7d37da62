"""One door to every checkpoint format."""

from pathlib import Path

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.gguf import GGUFCheckpoint
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.checkpoint.resolve import ORBAX_CONFIG, resolve_model


def open_checkpoint(name_or_path: str | Path, *, allow_bare: bool = False) -> Checkpoint:
    """The checkpoint of a known name, a GGUF file, or a folder: one with a GGUF file, or a Hugging Face one.

    Args:
        name_or_path: see ``resolve_model``.
        allow_bare: a Hugging Face folder may lack its tensors; what its config says can be read all the same.

    Raises:
        CheckpointError: nothing is found, or what is found cannot be served; one line naming the fault.
    """
    path = resolve_model(name_or_path)
    if not path.is_dir():
        return GGUFCheckpoint(path)
    if (path / ORBAX_CONFIG).is_file():
        raise CheckpointError(f"{path} is an orbax folder, which cannot be read yet")
    return HFCheckpoint(path, allow_bare=allow_bare)
