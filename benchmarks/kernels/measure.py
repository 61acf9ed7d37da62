"""What the kernel benchmarks share: clocks, measured ceilings, and the record that every result carries."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


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


def ceilings() -> dict[str, float]:
    """GB/s of reading and of copying device memory, and TFLOP/s of a bfloat16 product, by XLA's own kernels."""
    x = random_normal(0, (1 << 20, 2048))  # 4 GiB
    copy, total = jax.jit(lambda x: x + 1), jax.jit(lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32))
    result = {
        "copy_read_plus_write_gb_per_s": 2 * x.nbytes / seconds(lambda: copy(x), calls=3) / 1e9,
        "reduce_read_gb_per_s": x.nbytes / seconds(lambda: total(x), calls=3) / 1e9,
    }
    product, y = jax.jit(lambda y, x: y @ x.T), random_normal(1, (16, 2048))
    moved = x.nbytes + 2 * 16 * x.shape[0]
    result["skinny_product_gb_per_s"] = moved / seconds(lambda: product(y, x), calls=3) / 1e9
    a, b = random_normal(2, (8192, 8192)), random_normal(3, (8192, 8192))
    square = jax.jit(lambda a, b: a @ b)
    result["bf16_tflop_per_s"] = 2 * 8192**3 / seconds(lambda: square(a, b)) / 1e12
    return result


def provenance() -> dict[str, Any]:
    """Device, driver, versions, commit and command."""

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": jax.devices()[0].device_kind,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
        "commit": output("git", "rev-parse", "HEAD") or "unknown",
        "command": " ".join(sys.argv),
    }


def write(path: str | None, results: dict[str, Any]) -> None:
    """The results with their provenance, as JSON."""
    if path:
        Path(path).write_text(json.dumps(provenance() | results, indent=1) + "\n")
