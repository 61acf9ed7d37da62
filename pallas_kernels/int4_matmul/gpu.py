"""The int4 product on Hopper: packed once, then a kernel for few tokens and XLA's own product for many."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul import gpu_product, gpu_unpack
from pallas_kernels.int4_matmul.gpu_stream import Tuning

GROUPS = (32, 64, 128)
_TOP = 15  # scales and biases of a feature are kept below 2**15: float16 has 29 binary digits of range below it


class PreparedInt4(NamedTuple):
    """An int4 matrix as the kernel reads it, ``weight = (scale * (number - 8) + bias) * row_scale``, or with whole zero
    points ``scale * (number - zero point) * row_scale``; F and D padded to multiples of 128."""

    weights: jax.Array  # [F/64, D/128, 8, 128] int32 of ``gpu_unpack.pack``
    scale: jax.Array  # [F/64, D/G, 64] float16
    bias: jax.Array | None  # as scale, or None for zeros
    origin: jax.Array | None  # as scale, bfloat16: ``gpu_unpack.ORIGIN`` + zero points, which cost next to nothing
    row_scale: jax.Array  # [F] float32, not padded: powers of two, which keep float16 within its range


def refusal(num_features: int, num_inputs: int, num_groups: int) -> str | None:
    """Why ``prepare`` does not take a matrix of these shapes; None if it does."""
    if num_inputs % num_groups:
        return f"{num_inputs} input features do not divide into {num_groups} groups"
    group = num_inputs // num_groups
    if group not in GROUPS and num_groups != 1:
        return f"groups of {group} input features are none of {GROUPS}, nor one a row"
    if num_inputs % (32 if num_groups == 1 else group):
        return f"{num_inputs} input features are not a multiple of 32"
    return None


@functools.partial(jax.jit, static_argnames=("whole_zeros", "repack"))
def prepare(w: Any, *, whole_zeros: bool = False, repack: bool = True) -> PreparedInt4:
    """Puts an ``Int4Matrix`` into the kernel's order, on its device.

    Args:
        w: ``q`` uint8 ``[F, D/2]``, ``scale`` and ``bias`` (or None: -8 scale) ``[F, D/G]``; G is 32, 64, 128 or D.
        whole_zeros: every bias is minus the scale times a whole number of 0 to 127.
        repack: False keeps the nibbles where they are, ``weights [F, D]`` int4: Mosaic's own conversion is used, which
            takes twice the instructions; groups of 128 only.

    Raises:
        ValueError: the shapes are not such.
    """
    (f, half), num_groups = w.q.shape, w.scale.shape[1]
    if why := refusal(f, 2 * half, num_groups):
        raise ValueError(why)
    d, group = 2 * half, 2 * half // num_groups
    scale = w.scale.astype(jnp.float32)
    bias = None if w.bias is None else w.bias.astype(jnp.float32) + gpu_unpack.MIDDLE * scale
    origin = None
    if whole_zeros and w.bias is not None:
        bias, zero = None, -w.bias.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)
        origin = gpu_unpack.ORIGIN + jnp.round(zero)
    largest = jnp.max(jnp.abs(scale), axis=1)
    if bias is not None:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(bias), axis=1))
    _, exponent = jnp.frexp(largest)
    exponent = jnp.clip(jnp.where(largest > 0, exponent - _TOP, 0), -126, 126)
    row_scale = jnp.ldexp(jnp.float32(1), exponent)

    def arrange(a: jax.Array, dtype: Any = jnp.float16) -> jax.Array:
        if group not in GROUPS:  # one a row: as groups of the padded matrix
            a = jnp.repeat(a, -(-d // 128), axis=1)
        per_tile = 1 if group not in GROUPS else 128 // group
        a = jnp.pad(a, ((0, -f % 128), (0, -a.shape[1] % per_tile)))
        return a.reshape(-1, gpu_unpack.ROWS, a.shape[1]).transpose(0, 2, 1).astype(dtype)

    q = jnp.pad(w.q, ((0, -f % 128), (0, -half % 64)), constant_values=0x88)
    if repack:
        weights = gpu_unpack.pack(gpu_unpack.nibbles(q), 4)
    else:
        if group != 128 or origin is not None:
            raise ValueError(f"groups of {group}: a matrix that is not repacked has groups of 128, and biases")
        weights = jax.lax.bitcast_convert_type(q ^ 0x88, jnp.int4).reshape(q.shape[0], -1)
    per_row = row_scale[:, None]
    return PreparedInt4(
        weights,
        arrange(scale / per_row),
        None if bias is None else arrange(bias / per_row),
        None if origin is None else arrange(origin, jnp.bfloat16),
        row_scale,
    )


@functools.partial(jax.jit, static_argnames=("out_dtype", "tuning", "interpret"))
def int4_matmul(
    x: jax.Array, w: PreparedInt4, *, out_dtype: Any = None, tuning: Tuning | None = None, interpret: Any = None
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
    return gpu_product.multiply(x, *w, out_dtype, tuning or Tuning(), interpret)
