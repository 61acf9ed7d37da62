"""The one place where a kernel's implementation is chosen.

The choice is an argument, made once for a device when the engine is built, and handed down: what a compiled step runs
can be read from its inputs. Nothing is tried and caught, and no environment variable is read.
"""

from collections.abc import Callable
from typing import Any, Literal

Implementation = Literal["reference", "mosaic_gpu", "xla"]


def is_hopper(device: Any) -> bool:
    """Whether ``device`` is an NVIDIA GPU of compute capability 9: its matrix instructions exist on no other."""
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")


# Variants of the Hopper kernels that have been right on a device (benchmarks/notes/paged_attention_gpu.md and
# int4_matmul_gpu.md). `scripts/test_gpu.sh` checks all there are, those that are not here, too. Decode of head_dim 256
# with 4 query heads a kv head is wrong there. A change of a variant takes it out until it has passed again.
MOSAIC_GPU_CHECKED = frozenset({
    "head_dim 64", "head_dim 96", "head_dim 128", "page_size 16", "page_size 32", "page_size 64", "page_size 128",
    "one kv head", "window", "softcap", "sinks", "kv int8", "kv fp8", "int4_matmul", "int8_matmul",
    "rope_append", "rope_append head_dim 64", "rope_append head_dim 96", "rope_append head_dim 128",
})  # fmt: skip


def best(device: Any, *, hopper: frozenset[str] | None = None) -> Implementation:
    """The fastest implementation on ``device`` (a ``jax.Device``, or a description with its ``platform``) that is known
    to be right there.

    ``hopper``: the variants that the shapes in question need of the kernels for Hopper, of their module's ``needs``;
    None if they do not take them.
    """
    checked = hopper is not None and hopper <= MOSAIC_GPU_CHECKED
    return "mosaic_gpu" if checked and is_hopper(device) else "reference"


def best_grouped_matmul(device: Any) -> Implementation:
    """As ``best``, for the grouped matrix product: the reference is a loop, which makes an accelerator wait."""
    return "reference" if device.platform == "cpu" else "xla"


def best_quantized_matmul(device: Any, *, hopper: str | None = None) -> Implementation:
    """As ``best``, for products with 4-bit and 8-bit matrices: the reference is a loop, which makes an accelerator
    wait. ``hopper``: the kernel for Hopper, "int4_matmul" or "int8_matmul", that takes the matrix; None if none does.
    """
    if device.platform == "cpu":
        return "reference"
    return "mosaic_gpu" if hopper in MOSAIC_GPU_CHECKED and is_hopper(device) else "xla"


def choose(implementations: dict[str, Callable[..., Any]], name: Implementation | None) -> Callable[..., Any]:
    """The implementation called ``name``; None is the reference, which runs everywhere."""
    if name is None:
        return implementations["reference"]
    if name not in implementations:
        raise ValueError(f"implementation={name!r} does not exist; there is {', '.join(sorted(implementations))}")
    return implementations[name]
