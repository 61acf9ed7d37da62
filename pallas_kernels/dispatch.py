"""The one place where a kernel's implementation is chosen."""

from collections.abc import Callable
from typing import Any, Literal

Implementation = Literal["reference"]


def choose(implementations: dict[str, Callable[..., Any]], name: Implementation | None) -> Callable[..., Any]:
    """The implementation called ``name``; None takes the best that exists: today the jnp reference everywhere."""
    if name is None:
        return implementations["reference"]
    if name not in implementations:
        raise ValueError(f"implementation={name!r} does not exist; there is {', '.join(sorted(implementations))}")
    return implementations[name]
