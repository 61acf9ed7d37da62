"""What a method makes of a model: which matrices are quantized, and in which format."""

import dataclasses

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import MatrixFormat, ModelConfig, QuantizationConfig, QuantizedMatrices
from jaxserve.model.array_spec import ArraySpec
from jaxserve.model.params import named_leaves, param_specs
from jaxserve.model.quantized import QUANTIZABLE, quantized_specs

_INT4 = MatrixFormat(kind="int4", has_bias=True)
METHODS = {
    "int8": MatrixFormat(kind="int8"),
    "w8a8": MatrixFormat(kind="int8", activations="int8"),
    "int4-rtn": _INT4,
    "gptq": dataclasses.replace(_INT4, has_perm=True),
    "awq": _INT4,
}  # groups of an int4 are chosen by the matrix' width
CALIBRATED = frozenset({"gptq", "awq"})  # which read text
GROUP_SIZES = (128, 64, 32)  # that kernels take, the cheapest first
KEPT = frozenset({"embed", "head"})  # the first and last are the most sensitive, and a tied one is both


def quantized_config(config: ModelConfig, method: str, group_size: int | None = None) -> ModelConfig:
    """``config`` with every matrix of the layers quantized; tables, routers, norms and biases stay as they are.

    Args:
        method: a key of ``METHODS``.
        group_size: input columns that share an int4's scale; None takes for each matrix the largest of
            ``GROUP_SIZES`` that divides its columns.

    Raises:
        CheckpointError: the method is not known or has no groups; the model is quantized already; a group does not
            divide a matrix' columns (both numbers).
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
    by_format: dict[MatrixFormat, list[str]] = {}
    for name, spec in named_leaves(param_specs(config)):
        field = name.rpartition(".")[2]
        if field in QUANTIZABLE - KEPT:
            by_format.setdefault(_format_for(matrix_format, name, spec, group_size), []).append(name)
    matrices = tuple(QuantizedMatrices(format=f, parameters=tuple(names)) for f, names in by_format.items())
    return dataclasses.replace(config, quantization=QuantizationConfig(method=method, matrices=matrices))


def _format_for(matrix_format: MatrixFormat, name: str, spec: ArraySpec, group_size: int | None) -> MatrixFormat:
    if matrix_format.kind == "int4":
        columns = spec.shape[-1]
        if group_size is None:
            group_size = next((g for g in GROUP_SIZES if columns % g == 0), None)
            if group_size is None:
                raise CheckpointError(
                    f"params.{name}: none of the groups {', '.join(map(str, GROUP_SIZES))} divides its {columns} input "
                    "columns; give a group_size that does"
                )
        try:
            matrix_format = dataclasses.replace(matrix_format, group_size=group_size)
        except ValueError as e:
            raise CheckpointError(f"group_size={group_size}: {e}") from None
    try:
        quantized_specs(name, spec, matrix_format)
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    return matrix_format
