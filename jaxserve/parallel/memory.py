"""How much of a device's memory there is for us: XLA takes its share of it once, when jax first looks for devices."""

import os
from typing import Any

# The variable of jaxlib's client, and its older name; one of them may be set.
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_XLA_DEFAULT = 0.75
DEFAULT_FRACTION = 0.88  # of a device's memory, for weights, cache and workspace together
# Beside what is planned XLA's share has room for what lies badly in it; outside of the share are the CUDA context, the
# programs, their graphs and NCCL's buffers.
_RESERVED_BESIDE, _LARGEST_SHARE, _USABLE = 0.05, 0.98, 0.95


def reserve(fraction: float | None) -> None:
    """Has XLA take enough of each GPU for ``fraction`` (None: the default) of it to be used. Without effect where the
    user has set XLA's variable, or jax has looked for devices before."""
    if not any(os.environ.get(name) for name in VARIABLES):
        share = (DEFAULT_FRACTION if fraction is None else fraction) + _RESERVED_BESIDE
        os.environ[VARIABLES[0]] = f"{min(share, _LARGEST_SHARE):.2f}"


def free_bytes(device: Any, fraction: float) -> int:
    """Bytes of ``device`` (an accelerator) that may still be taken, if ``fraction`` of its memory may be used: of all
    its memory on GPUs, whatever XLA's share is, but not more than fits in that share."""
    stats = device.memory_stats()
    limit = stats["bytes_limit"]
    if device.platform != "gpu":
        return int(limit * fraction) - stats["bytes_in_use"]
    share = next((float(os.environ[name]) for name in VARIABLES if os.environ.get(name)), _XLA_DEFAULT)
    return min(int(limit / share * fraction), int(limit * _USABLE)) - stats["bytes_in_use"]
