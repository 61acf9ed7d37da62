"""An open checkpoint seen as a quantized one: what a converter reads is quantized when it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxserve.checkpoint.mapped import drop_pages_of
from jaxserve.checkpoint.protocol import Checkpoint
from jaxserve.config import MatrixFormat, ModelConfig
from jaxserve.model.params import ParamSource, named_leaves, param_specs
from jaxserve.quantization.rounding import round_to_nearest
from jaxserve.text.tokenizer import Tokenizer

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # ``model.params.ParamSource.read``


class QuantizedCheckpoint:
    """``source``, with the parameters of ``params`` (``checkpoint.protocol.Checkpoint``). Closing it closes the source.

    Attributes:
        config: of ``recipe.quantized_config``.
        plain: the source.
        recipe: what besides the source decides the values, for ``convert.source_digest``.
    """

    def __init__(self, source: Checkpoint, config: ModelConfig, params: ParamSource, recipe: str):
        self.plain, self.config, self._params, self.recipe = source, config, params, recipe
        self.path: Path = source.path
        self.source_folder: Path = getattr(source, "source_folder", source.path)
        self.architecture, self.model_name, self.license = source.architecture, source.model_name, source.license
        self.num_bytes, self.num_params = source.num_bytes, source.num_params
        self.sampling_defaults: dict[str, Any] = source.sampling_defaults

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.plain.close()

    def tokenizer(self) -> Tokenizer | None:
        return self.plain.tokenizer()

    def tensor_types(self) -> dict[str, int]:
        return self.plain.tensor_types()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._params.read(name, index)

    def drop_pages(self) -> None:
        drop_pages_of(self.plain)


class RoundedSource:
    """A ``ParamSource`` of ``config``'s parameters over ``read`` of the plain ones, rounded to nearest.

    Holds nothing: a part costs the rows it is made of, read as whole groups.
    """

    def __init__(self, read: Read, config: ModelConfig):
        assert config.quantization is not None
        self._read = read
        self._formats = config.quantization.formats()
        specs = dict(named_leaves(param_specs(config)))
        self._num_columns = {
            name: specs[f"{name}.q"].shape[-1] * _per_byte(form) for name, form in self._formats.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        matrix, _, field = name.rpartition(".")
        form = self._formats.get(matrix)
        if form is None:
            return self._read(name, index)
        columns, num_columns = index[-1], self._num_columns[matrix]
        group = form.group_size or num_columns
        unit = _per_byte(form) if field == "q" else group  # input columns in an element of what is asked
        start, stop = columns.start * unit // group * group, -(-columns.stop * unit // group) * group
        plain = self._read(matrix, (*index[:-1], slice(start, stop)))
        values = round_to_nearest(matrix, form, plain)[field]
        return values[..., columns.start - start // unit : columns.stop - start // unit]


def _per_byte(matrix_format: MatrixFormat) -> int:
    return 2 if matrix_format.kind == "int4" else 1
