"""A folder that is being written: what makes an interrupted conversion continue, and never look finished.

``jaxserve.partial.json`` says what the folder is to hold; each line of ``jaxserve.partial.log`` is a part of it whose
bytes are on the disk. Both go when all is there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxserve.checkpoint.errors import CheckpointError

Progress = Callable[[str, int, int], None]  # stage, done, total

PARTIAL, PARTIAL_LOG = "jaxserve.partial.json", "jaxserve.partial.log"
RESERVE_BYTES = 16 << 20  # for what is not tensors, when free disk space is compared


@dataclass(frozen=True)
class Plan:
    """What a folder is to hold: an interrupted conversion continues only if its plan is the same."""

    source: str  # ``convert.source_digest``
    model_name: str
    architecture: str
    dtype: str | None  # None: each tensor's own
    num_tensors: int
    format: str = "orbax"

    def __str__(self) -> str:
        dtype = self.dtype or "as stored"
        return f"{self.model_name} ({self.architecture}, dtype {dtype}, {self.num_tensors} tensors, {self.format})"


class Log:
    """The parts that are done, each an object, in the order they were.

    Attributes:
        entries: those of earlier runs. A last line that was cut off is no part.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.entries: list[dict[str, Any]] = []
        file.seek(0)
        end = 0
        for line in file.read().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            end += len(line)
            self.entries.append(entry)
        file.truncate(end)

    def append(self, entry: dict[str, Any]) -> None:
        """Durably; the part's own bytes must be on the disk before."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def unfinished(folder: Path, plan: Plan) -> Iterator[Log]:
    """Begins or continues to write ``plan`` into ``folder``, which is whole when the block ends without an error.

    Raises:
        CheckpointError: the folder has something else, another process writes it, or the disk is full or read-only.
            What is finished by then stays for the next run.
    """
    with _disk_errors(folder):
        started = _is_started(folder, plan)
        folder.mkdir(parents=True, exist_ok=True)
        if not started:
            write_durably(folder / PARTIAL, json.dumps(asdict(plan)).encode())
        with open(folder / PARTIAL_LOG, "a+b") as file, _only_writer(file, folder):
            yield Log(file)
        for name in (PARTIAL_LOG, PARTIAL):
            with suppress(OSError):  # all is there: what is left over does no harm
                (folder / name).unlink()


def check_whole(folder: Path) -> None:
    """Raises CheckpointError, with how many tensors of how many are there, where a conversion has not ended."""
    try:
        plan = json.loads((folder / PARTIAL).read_bytes())
        lines = [line for line in (folder / PARTIAL_LOG).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        num_done = sum(json.loads(line).get("tensors", 1) for line in lines)
        num_tensors = plan["num_tensors"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        num_done = num_tensors = "an unknown number"
    raise CheckpointError(
        f"{folder} is not whole: {num_done} of {num_tensors} tensors are there; the conversion that was interrupted "
        "continues when it is run again"
    )


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises CheckpointError where the disk has less room than ``num_bytes`` of tensors take, with both numbers."""
    free = shutil.disk_usage(folder).free
    if num_bytes + RESERVE_BYTES > free:
        raise CheckpointError(f"{folder}: at least {num_bytes} bytes are to be written, the disk has {free} free")


def write_durably(path: Path, data: bytes) -> None:
    """Replaces ``path`` at once: whoever reads it finds all of ``data`` or what was there before, after a crash too."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_started(folder: Path, plan: Plan) -> bool:
    """Whether ``folder`` has the beginning of this very plan."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder")
    try:
        found: Any = json.loads((folder / PARTIAL).read_bytes())
    except FileNotFoundError:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(f"{PARTIAL}."))
        if names:
            raise CheckpointError(f"{folder} is not empty: it has {names[0]!r:.80} and is no conversion") from None
        return False
    except ValueError:
        found = None
    if found == asdict(plan):
        return True
    try:
        there = str(Plan(**found))
    except TypeError:
        there = "what cannot be read"
    other = " from other files" if there == str(plan) else ""
    raise CheckpointError(
        f"{folder} has an unfinished conversion of {there}{other}; asked was {plan}: remove it or give another folder"
    )


@contextmanager
def _only_writer(log: Any, folder: Path) -> Iterator[None]:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{folder}: another process is converting into it") from None
    yield  # closing the file ends the lock


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What the system says of a disk that is full, read-only or broken, as a CheckpointError."""
    try:
        yield
    except OSError as e:
        raise CheckpointError(f"{e.filename or folder}: cannot be written: {e.strerror or e}") from None
