"""The safetensors files of a Hugging Face folder, mapped: one file, or the shards that an index lists."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.hf.safetensors_header import TensorInfo, read_header, view_tensor
from jaxserve.checkpoint.json_file import read_json, shown
from jaxserve.checkpoint.mapped import drop_pages

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensor name -> the tensor, as a read-only view of its mapped file. Threads may read at once.

    Attributes:
        infos: every tensor's type, shape and place in its file.
        num_bytes: of all files.

    Raises:
        CheckpointError: a file is missing, malformed, or not what the index says; starting with its path.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self.num_bytes = 0
        self._file_of: dict[str, str] = {}
        self._data: dict[str, np.ndarray] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index is not None else [_single(folder)]:
            data = map_file(folder / file)
            try:
                infos = read_header(memoryview(data))  # type: ignore[arg-type]
            except CheckpointError as e:
                raise CheckpointError(f"{folder / file}: {e}") from None
            for name in infos:
                if name in self.infos:
                    raise CheckpointError(
                        f"tensor {shown(name, 120)} is in both {self._file_of[name]} and {file} of {folder}"
                    )
                if index is not None and index.get(name) != file:
                    told = f"in {index[name]}" if name in index else "nowhere"
                    raise CheckpointError(
                        f"{folder / file} has tensor {shown(name, 120)}, which {INDEX} says is {told}"
                    )
                self._file_of[name] = file
            self.infos |= infos
            self.num_bytes += data.size
            self._data[file] = data
        for name, file in (index or {}).items():
            if name not in self.infos:
                raise CheckpointError(f"{folder / file} has no tensor {shown(name, 120)}, which {INDEX} says it has")

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._file_of[name]
        data = self._data.get(file)
        if data is None:
            raise CheckpointError(f"{self.folder} is closed")
        return view_tensor(data, self.infos[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def file_of(self, name: str) -> str:
        """Name of the file that has a tensor."""
        return self._file_of[name]

    def drop_pages(self) -> None:
        """See ``mapped.drop_pages``."""
        for data in self._data.values():
            drop_pages(data)

    def close(self) -> None:
        """Unmaps the files once no part of them is in use any more."""
        self._data = {}


def has_tensors(folder: Path) -> bool:
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> file of the index; None where there is none."""
    if not (folder / INDEX).exists():
        return None
    try:
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{INDEX}: weight_map={shown(index)} is not an object of tensors")
        for name, file in index.items():
            # A name and no path: an index must not lead out of its folder.
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or Path(file).name != file
                or "\0" in file
            ):
                raise CheckpointError(
                    f"{INDEX}: weight_map[{shown(name, 120)}]={shown(file)} is not a .safetensors file"
                )
    except CheckpointError as e:
        raise CheckpointError(f"{folder}: {e}") from None
    if (folder / SINGLE).exists() and SINGLE not in index.values():
        raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}, which lists other files: remove one")
    return index


def _single(folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if SINGLE in files:
        return SINGLE
    if len(files) != 1:
        raise CheckpointError(
            f"{folder} must hold {SINGLE}, or {INDEX} and its files, it holds: {shown(', '.join(files) or 'none', 200)}"
        )
    return files[0]


def map_file(path: Path) -> np.ndarray:
    """The file's bytes ``[num_bytes]`` u8, memory-mapped."""
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        return np.memmap(path, np.uint8, mode="r")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeError:  # a lone surrogate, which no file system takes
        raise CheckpointError(f"{path.parent}: {shown(path.name)} is not a file name") from None
