"""The int8 product on Hopper: packed once, then int4's kernel for few tokens and XLA's product for many."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul import gpu_stream, gpu_unpack
from pallas_kernels.int4_matmul.gpu_stream import Tuning

MANY_TOKENS = 64  # beyond, XLA's product, which converts the matrix as it reads it


class PreparedInt8(NamedTuple):
    """An int8 matrix as the kernel reads it; F and D padded to multiples of 128."""

    weights: jax.Array  # [F/64, D/128, 16, 128] int32 of ``gpu_unpack.pack``
    row_scale: jax.Array  # [F] float32, not padded


@jax.jit
def prepare(w: Any) -> PreparedInt8:
    """Puts an ``Int8Matrix`` into the kernel's order, on its device.

    Args:
        w: ``q`` int8 ``[F, D]``, ``scale`` ``[F, 1]``, no bias.

    Raises:
        ValueError: the matrix has groups, biases or another type.
    """
    if w.q.dtype != jnp.int8 or w.scale.shape != (w.q.shape[0], 1) or w.bias is not None:
        bias = "no biases" if w.bias is None else "biases"
        raise ValueError(
            f"q is {w.q.dtype}{list(w.q.shape)} with scales {list(w.scale.shape)} and {bias}; "
            f"the kernel takes int8 with scales [{w.q.shape[0]}, 1] and no biases"
        )
    f, d = w.q.shape
    q = jnp.pad(jax.lax.bitcast_convert_type(w.q, jnp.uint8), ((0, -f % 128), (0, -d % 128)))
    return PreparedInt8(gpu_unpack.pack(q, 8), w.scale[:, 0].astype(jnp.float32))


@jax.jit
def dequantize(w: PreparedInt8) -> jax.Array:
    """``[F, D']`` bfloat16 without the scales, which are the rows' and multiply outputs; D' is padded."""
    tiles = gpu_unpack.unpack(w.weights)  # [FB, KB, 64, 128]
    rows = tiles.transpose(0, 2, 1, 3).reshape(tiles.shape[0] * gpu_unpack.ROWS, -1)
    return rows[: w.row_scale.shape[0]]


@functools.partial(jax.jit, static_argnames=("tuning", "many_tokens", "interpret"))
def int8_matmul(
    x: jax.Array,
    w: PreparedInt8,
    *,
    tuning: Tuning | None = None,
    many_tokens: int = MANY_TOKENS,
    interpret: Any = None,
) -> jax.Array:
    """``x @ weight.T`` accumulated in float32.

    Args:
        x: ``[M, D]`` bfloat16.
        w: of ``prepare``.
        tuning: None takes the defaults.
        many_tokens: with more XLA multiplies; 0 always does so.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[M, F]`` bfloat16.
    """
    num_tokens, d = x.shape
    row_blocks, steps = w.weights.shape[:2]
    padded, num_features = steps * gpu_unpack.COLUMNS, w.row_scale.shape[0]
    if not padded - gpu_unpack.COLUMNS < d <= padded or x.dtype != jnp.bfloat16:
        raise ValueError(f"x is {x.dtype}[{num_tokens}, {d}]; the matrix takes bfloat16 of {padded} inputs, padded")
    if num_tokens > many_tokens:
        x = jnp.pad(x, ((0, 0), (0, padded - d)))
        contract = (((1,), (1,)), ((), ()))
        out = jax.lax.dot_general(x, dequantize(w), contract, preferred_element_type=jnp.float32)
        return (out * w.row_scale).astype(x.dtype)
    t = tuning or Tuning()
    split = gpu_stream.split_of(num_tokens, row_blocks, steps, t)
    x = jnp.pad(x, ((0, -num_tokens % split.tokens), (0, padded - d))).reshape(-1, split.tokens, padded)
    row_scale = jnp.pad(w.row_scale, (0, row_blocks * gpu_unpack.ROWS - num_features))
    out = gpu_stream.multiply(x, w.weights, None, None, row_scale, split=split, t=t, interpret=interpret)
    return out[:num_tokens, :num_features]
