"""Files that are mapped into memory."""

import mmap
from typing import Any

import numpy as np


def drop_pages(data: np.ndarray | None) -> None:
    """Gives the pages of a mapped file back to the system, which reads them again when they are asked for. Else what
    was read stays part of this process' resident memory as long as the system has room."""
    mapping: Any = getattr(data, "_mmap", None)  # of a np.memmap
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def drop_pages_of(checkpoint: object) -> None:
    """The same for all files of a checkpoint, if it maps any."""
    drop = getattr(checkpoint, "drop_pages", None)
    if drop is not None:
        drop()
