"""A product with a packed matrix on Hopper, of 4 bits or 8: which way for how many tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import gpu_dequantize, gpu_stream, gpu_unpack
from pallas_kernels.int4_matmul.gpu_stream import Tuning


def multiply(
    x: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    origin: jax.Array | None,
    row_scale: jax.Array,
    out_dtype: Any,
    t: Tuning,
    interpret: Any,
) -> jax.Array:
    """``x @ (row_scale * (scale * q + bias)).T``, or with an origin, accumulated in float32.

    Args:
        x: ``[M, D]`` bfloat16.
        weights, scale, bias, origin: as of ``gpu_stream.multiply``, of F and D padded to multiples of 128.
        row_scale: ``[F]`` float32, not padded.
        out_dtype: of the result; None is x's.

    Returns:
        ``[M, F]``.

    Raises:
        ValueError: x is not of the matrix' D, or of another type.
    """
    (num_tokens, d), (num_features,) = x.shape, row_scale.shape
    repacked = weights.ndim == 4
    steps = weights.shape[1] // (1 if repacked else gpu_unpack.COLUMNS)
    row_blocks = weights.shape[0] // (1 if repacked else gpu_unpack.ROWS)
    padded = steps * gpu_unpack.COLUMNS
    if not padded - gpu_unpack.COLUMNS < d <= padded or x.dtype != jnp.bfloat16:
        raise ValueError(f"x is {x.dtype}[{num_tokens}, {d}]; the matrix takes bfloat16 of {padded} inputs, padded")
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    row_scale = jnp.pad(row_scale, (0, row_blocks * gpu_unpack.ROWS - num_features))
    if num_tokens > t.many_tokens and repacked:
        x = jnp.pad(x, ((0, 0), (0, padded - d)))
        # Not before x is there: XLA may dequantize the matrices of all layers first, and hold them all.
        x, weights = lax.optimization_barrier((x, weights))
        if t.xla_dequantizes:
            weight = dequantize(weights, scale, bias, origin, row_scale)
        else:
            weight = gpu_dequantize.dequantize(weights, scale, bias, origin, row_scale, interpret=interpret)
        # In the type that is wanted: accumulators are f32 all the same, and there is no kernel that only rounds.
        out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
    else:
        split = gpu_stream.split_of(num_tokens, row_blocks, steps, t)
        x = jnp.pad(x, ((0, -num_tokens % split.tokens), (0, padded - d))).reshape(-1, split.tokens, padded)
        out = gpu_stream.multiply(
            x, weights, scale, bias, origin, row_scale, split=split, out_dtype=out_dtype, t=t, interpret=interpret
        )
    return out[:num_tokens, :num_features]


def dequantize(
    weights: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    origin: jax.Array | None,
    row_scale: jax.Array,
) -> jax.Array:
    """What ``gpu_dequantize.dequantize`` gives, by XLA."""
    tiles = gpu_unpack.unpack(weights, jnp.float32)  # [FB, KB, 64, 128]
    row_blocks, steps = tiles.shape[:2]

    def spread(a: jax.Array) -> jax.Array:
        a = a.astype(jnp.float32).reshape(row_blocks, steps, -1, gpu_unpack.ROWS).transpose(0, 1, 3, 2)
        return a[..., None]  # [FB, KB, 64, groups, 1]

    if scale is not None:
        grouped = tiles.reshape(*tiles.shape[:3], scale.shape[1] // steps, -1)
        if origin is not None:
            grouped = grouped + (gpu_unpack.ORIGIN + gpu_unpack.MIDDLE - spread(origin))
        grouped = grouped * spread(scale)
        tiles = (grouped if bias is None else grouped + spread(bias)).reshape(tiles.shape)
    rows = tiles.transpose(0, 2, 1, 3).reshape(row_blocks * gpu_unpack.ROWS, -1)
    return (rows * row_scale[:, None]).astype(jnp.bfloat16)
