"""What every checkpoint format gives: a config, a tokenizer, and the parameters piece by piece."""

from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.text.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """An open checkpoint whose config and tensor shapes have been checked. Close it, or use it as a context.

    It is a ``model.params.ParamSource``: parameters have the names, shapes and order of ``model.params.param_specs``,
    whatever the file calls them and however it splits them.

    Attributes:
        path: the file or folder.
        config: the model's sizes and flags.
        architecture: what the checkpoint calls its own.
        model_name: for people.
        license: None where the checkpoint does not say.
        num_bytes: of all its files of tensors.
        num_params: elements of all tensors; a tied embedding counts once.
        sampling_defaults: fields of ``SamplingParams`` that the model's makers recommend (temperature, top_p, ...).
    """

    path: Path
    config: ModelConfig
    architecture: str
    model_name: str
    license: str | None
    num_bytes: int
    num_params: int
    sampling_defaults: dict[str, Any]

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def close(self) -> None:
        """Unmaps the files; what the attributes say stays readable."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer and chat template; None where the checkpoint has none."""
        ...

    def tensor_types(self) -> dict[str, int]:
        """Bytes of tensor data by the format's own name of the element type, most first."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part ``index`` (one slice with a start and a stop for each axis) of parameter ``name``, in float32 or in the
        file's own float type. Reads little more of the file than that part; threads may call it at once."""
        ...
