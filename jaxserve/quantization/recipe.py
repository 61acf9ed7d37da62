"""What a method makes of a model: which matrices are quantized, and in which format."""

import dataclasses
from collections.abc import Mapping

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import MatrixFormat, ModelConfig, QuantizationConfig, QuantizedMatrices
from jaxserve.model.array_spec import ArraySpec
from jaxserve.model.params import named_leaves, param_specs
from jaxserve.model.quantized import QUANTIZABLE, quantized_specs

_INT4 = MatrixFormat(kind="int4", has_bias=True, has_whole_zeros=True)
METHODS = {
    "int8": MatrixFormat(kind="int8"),
    "w8a8": MatrixFormat(kind="int8", activations="int8"),
    "int4-rtn": _INT4,
    "gptq": dataclasses.replace(_INT4, has_perm=True),
    "awq": _INT4,
}
CALIBRATED = frozenset({"gptq", "awq"})  # which read text
GROUP_SIZES = (128, 64, 32)  # that kernels take, the cheapest first
SYMMETRIC = ("int4-rtn", "gptq")  # which can do without zero points; int8 always does, AWQ's files always have them
KEPT = frozenset({"embed", "head"})  # the first and last are the most sensitive, and a tied one is both
_MATRICES = QUANTIZABLE - KEPT


def quantized_config(
    config: ModelConfig, method: str, group_size: int | None = None, *, symmetric: bool = False
) -> ModelConfig:
    """``config`` with every matrix of the layers quantized; tables, routers, norms and biases stay as they are.

    Args:
        method: a key of ``METHODS``.
        group_size: input columns that share an int4's scale; None takes the largest of ``GROUP_SIZES`` that divides
            the columns of every matrix: files of other tools have one for a model.
        symmetric: an int4 without zero points.

    Raises:
        CheckpointError: the method is not known, has no groups or no choice of zero points; the model is quantized
            already; a group does not divide a matrix' columns (both numbers).
    """
    if method not in METHODS:
        raise CheckpointError(f"quantize={method!r:.40} is not one of {', '.join(METHODS)}")
    if config.quantization is not None:
        raise CheckpointError(
            f"quantize={method!r}: the model is quantized already ({config.quantization.method}); "
            "quantization='none' dequantizes it first"
        )
    matrix_format = METHODS[method]
    if group_size is not None and matrix_format.kind != "int4":
        raise CheckpointError(f"group_size={group_size}: quantize={method!r} has a scale a row, no groups")
    if symmetric:
        if method not in SYMMETRIC:
            raise CheckpointError(f"symmetric: quantize={method!r} is not one of {', '.join(SYMMETRIC)}")
        matrix_format = dataclasses.replace(matrix_format, has_bias=False, has_whole_zeros=False)
    specs = {name: spec for name, spec in named_leaves(param_specs(config)) if name.rpartition(".")[2] in _MATRICES}
    if matrix_format.kind == "int4":
        if group_size is None:
            group_size = _group_size(specs)
        try:
            matrix_format = dataclasses.replace(matrix_format, group_size=group_size)
        except ValueError as e:
            raise CheckpointError(f"group_size={group_size}: {e}") from None
    for name, spec in specs.items():
        try:
            quantized_specs(name, spec, matrix_format)
        except ValueError as e:
            raise CheckpointError(str(e)) from None
    matrices = (QuantizedMatrices(format=matrix_format, parameters=tuple(specs)),)
    return dataclasses.replace(config, quantization=QuantizationConfig(method=method, matrices=matrices))


def _group_size(specs: Mapping[str, ArraySpec]) -> int:
    for size in GROUP_SIZES:
        undivided = {name: spec.shape[-1] for name, spec in specs.items() if spec.shape[-1] % size}
        if not undivided:
            return size
    name, columns = next(iter(undivided.items()))
    raise CheckpointError(
        f"params.{name}: none of the groups {', '.join(map(str, GROUP_SIZES))} divides its {columns} input columns; "
        "give a group_size that does"
    )
