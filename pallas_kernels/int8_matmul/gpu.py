"""The int8 product on Hopper: packed once, then int4's kernel for few tokens and XLA's product for many."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul import gpu_product, gpu_unpack
from pallas_kernels.int4_matmul.gpu_stream import Tuning


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


@functools.partial(jax.jit, static_argnames=("out_dtype", "tuning", "interpret"))
def int8_matmul(
    x: jax.Array, w: PreparedInt8, *, out_dtype: Any = None, tuning: Tuning | None = None, interpret: Any = None
) -> jax.Array:
    """``x @ weight.T`` accumulated in float32.

    Args:
        x: ``[M, D]`` bfloat16.
        w: of ``prepare``.
        out_dtype: of the result; None is x's.
        tuning: None takes the defaults.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[M, F]``.

    Raises:
        ValueError: x is not of the matrix' D, or of another type.
    """
    return gpu_product.multiply(x, w.weights, None, None, None, w.row_scale, out_dtype, tuning or Tuning(), interpret)
