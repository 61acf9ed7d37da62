"""What a parameter is before it is an array."""

from typing import Any, NamedTuple


class ArraySpec(NamedTuple):
    """Shape and logical axes of one parameter; ``parallel/specs.py`` maps logical axes to mesh axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str | None = None  # None: the one that the model is served in


def is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)
