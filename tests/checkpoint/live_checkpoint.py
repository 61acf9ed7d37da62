"""A ``Checkpoint`` of arrays in memory, or of random numbers that are made when they are read."""

import hashlib
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.model.params import Params, TreeSource, named_leaves, num_params, param_specs
from jaxserve.text.tokenizer import Tokenizer


class LiveCheckpoint:
    """``params`` as an open checkpoint; without them, numbers that follow from a parameter's name and place.

    Attributes:
        reads: names of the parameters that were read, in order.
        fail_at: reading this parameter raises ``error``.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        path: Path = Path("/nowhere"),
        model_name: str = "live",
    ):
        self.path, self.config, self.model_name = path, config, model_name
        self.architecture = "llama"
        self.license: str | None = "apache-2.0"
        self.num_params = num_params(config)
        self.num_bytes = 2 * self.num_params
        self.sampling_defaults: dict[str, Any] = {"temperature": 0.5, "top_k": 3}
        self.reads: list[str] = []
        self.fail_at: str | None = None
        self.error: BaseException = KeyboardInterrupt()
        self._tokenizer = tokenizer
        self._tree = None if params is None else TreeSource(params, config)
        self._shapes = {name: spec.shape for name, spec in named_leaves(param_specs(config))}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def tensor_types(self) -> dict[str, int]:
        return {"bfloat16": self.num_bytes}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name == self.fail_at:
            raise self.error
        self.reads.append(name)
        if self._tree is not None:
            return self._tree.read(name, index)
        return lazy_values(name, index)


def lazy_values(name: str, index: tuple[slice, ...]) -> np.ndarray:
    """bfloat16 numbers (small bit patterns, made fast) that depend on the name and on the place along every axis."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest())
    bits = np.full((1,) * len(index), seed % 251, np.uint16)
    for axis, s in enumerate(index):
        shape = [1] * len(index)
        shape[axis] = -1
        bits = bits + (np.arange(s.start, s.stop) * (7 + 6 * axis) % 4093).astype(np.uint16).reshape(shape)
    return bits.view(ml_dtypes.bfloat16)
