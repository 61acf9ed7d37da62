"""Matrices quantized in numpy, by the definition of ``config.MatrixFormat``, and what they stand for."""

import dataclasses
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxserve.config import MatrixFormat, ModelConfig, QuantizationConfig, QuantizedMatrices
from jaxserve.model.params import LayerParams, Params, param_specs
from jaxserve.model.quantized import QuantizedMatrix


def quantize(w: np.ndarray, spec: QuantizedMatrix, seed: int = 0) -> tuple[QuantizedMatrix, np.ndarray]:
    """``w`` [..., out, in] in the format of ``spec``, and its dequantized values, f32, in w's order of columns."""
    form = spec.format
    perm = None if spec.perm is None else np.random.default_rng(seed).permutation(w.shape[-1])
    ordered = w if perm is None else w[..., perm]
    grouped = ordered.reshape(*w.shape[:-1], -1, form.group_size or w.shape[-1])
    if form.has_bias:
        low, high = grouped.min(-1), grouped.max(-1)
        scale, bias = (high - low) / 15, low
        q = np.rint((grouped - bias[..., None]) / scale[..., None])
        values = q * scale[..., None] + bias[..., None]
    else:
        largest = {"int4": 7, "int8": 127, "fp8": 448}[form.kind]
        scale, bias = np.abs(grouped).max(-1) / largest, None
        q = grouped / scale[..., None]
        q = q.astype(jnp.float8_e4m3fn).astype(np.float32) if form.kind == "fp8" else np.rint(q)
        values = q * scale[..., None]
        q = q + 8 if form.kind == "int4" else q
    q, values = q.reshape(w.shape), values.reshape(w.shape)
    q = (q[..., 0::2] + 16 * q[..., 1::2]).astype(np.uint8) if form.kind == "int4" else q.astype(spec.q.dtype)
    matrix = replace(
        spec,
        q=q,
        scale=scale.astype(np.float32),
        bias=None if bias is None else bias.astype(np.float32),
        perm=None if perm is None else perm.astype(np.int32),
    )
    return matrix, (values if perm is None else values[..., np.argsort(perm)]).astype(np.float32)


def quantized_model(
    config: ModelConfig, params: Params, formats: dict[str, MatrixFormat]
) -> tuple[ModelConfig, Params, Params]:
    """The model with the named fields quantized, its parameters, and the dequantized ones for the plain model."""
    matrices = []
    for field, form in formats.items():
        names = [field] if field in ("embed", "head") else [f"layers.{i}.{field}" for i in range(config.num_layers)]
        matrices.append(QuantizedMatrices(format=form, parameters=tuple(names)))
    config = replace(config, quantization=QuantizationConfig(method="test", matrices=tuple(matrices)))
    specs = param_specs(config)
    layers = []
    for i, (layer, spec) in enumerate(zip(params.layers, specs.layers, strict=True)):
        found = {}
        for name in (
            f.name for f in dataclasses.fields(LayerParams) if isinstance(getattr(spec, f.name), QuantizedMatrix)
        ):
            found[name] = quantize(np.asarray(getattr(layer, name)), getattr(spec, name), seed=i)
        layers.append(tuple(replace(layer, **{name: pair[which] for name, pair in found.items()}) for which in (0, 1)))
    tables = {name: (getattr(params, name),) * 2 for name in ("embed", "head")}
    for name in tables:
        if isinstance(spec := getattr(specs, name), QuantizedMatrix):
            tables[name] = quantize(np.asarray(getattr(params, name)), spec)
    both = [
        replace(params, layers=tuple(pair[which] for pair in layers), **{n: pair[which] for n, pair in tables.items()})
        for which in (0, 1)
    ]
    return config, both[0], both[1]
