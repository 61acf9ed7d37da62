"""What the kernel benchmarks share: clocks, measured ceilings, and the record that every result carries."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxserve.bench.ceilings import measure_ceilings, random_normal, seconds

__all__ = ["ceilings", "provenance", "random_normal", "seconds", "write"]


def ceilings() -> dict[str, float]:
    """GB/s of reading and of copying device memory, and TFLOP/s of a bfloat16 product, by XLA's own kernels."""
    found = measure_ceilings()
    names = ("copy_read_plus_write_gb_per_s", "reduce_read_gb_per_s", "skinny_product_gb_per_s")
    return {name: getattr(found, name) for name in names} | {"bf16_tflop_per_s": found.tflop_per_s}


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
        # No path of the machine: the module, and of files their names.
        "command": " ".join(
            ["python -m benchmarks.kernels." + Path(sys.argv[0]).stem, *(Path(a).name for a in sys.argv[1:])]
        ),
    }


def write(path: str | None, results: dict[str, Any]) -> None:
    """The results with their provenance, as JSON."""
    if path:
        Path(path).write_text(json.dumps(provenance() | results, indent=1) + "\n")
