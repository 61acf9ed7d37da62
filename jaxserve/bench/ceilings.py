"""What the device can do at best, measured: the ceilings that a run's figures are shares of."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of one device by XLA's own kernels."""

    read_gb_per_s: float  # the better of a reduction and of a product with few rows
    copy_read_plus_write_gb_per_s: float
    reduce_read_gb_per_s: float
    skinny_product_gb_per_s: float
    tflop_per_s: float  # of a square product in ``dtype``
    dtype: str


def seconds(f: Callable[[], Any], *, calls: int = 10, rounds: int = 5) -> float:
    """Median over rounds of the seconds of one call of ``f``, after two calls that do not count."""
    for _ in range(2):
        jax.block_until_ready(f())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = f()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def random_normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Made on the device."""
    return jax.jit(lambda k: (jax.random.normal(k, shape, jnp.float32) * scale).astype(dtype))(jax.random.key(seed))


def measure_ceilings(
    dtype: Any = jnp.bfloat16, *, read_bytes: int | None = None, product_size: int | None = None
) -> Ceilings:
    """Measures the default device. Its memory has to have room for twice ``read_bytes``.

    Args:
        read_bytes: None is 4 GiB, on CPUs 64 MiB: several times the last cache either way.
        product_size: rows and columns of the square product; None is 8192, on CPUs 512.
    """
    on_cpu = jax.default_backend() == "cpu"
    read_bytes = read_bytes or (64 << 20 if on_cpu else 4 << 30)
    size = product_size or (512 if on_cpu else 8192)
    itemsize, columns = jnp.dtype(dtype).itemsize, 2048
    x = random_normal(0, (read_bytes // itemsize // columns, columns), dtype)
    copy, total = jax.jit(lambda x: x + 1), jax.jit(lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32))
    copied = 2 * x.nbytes / seconds(lambda: copy(x), calls=3) / 1e9
    reduced = x.nbytes / seconds(lambda: total(x), calls=3) / 1e9
    product, y = jax.jit(lambda y, x: y @ x.T), random_normal(1, (16, columns), dtype)
    moved = x.nbytes + 16 * x.shape[0] * itemsize
    skinny = moved / seconds(lambda: product(y, x), calls=3) / 1e9
    a, b = random_normal(2, (size, size), dtype), random_normal(3, (size, size), dtype)
    square = jax.jit(lambda a, b: a @ b)
    return Ceilings(
        read_gb_per_s=max(reduced, skinny),
        copy_read_plus_write_gb_per_s=copied,
        reduce_read_gb_per_s=reduced,
        skinny_product_gb_per_s=skinny,
        tflop_per_s=2 * size**3 / seconds(lambda: square(a, b)) / 1e12,
        dtype=jnp.dtype(dtype).name,
    )
