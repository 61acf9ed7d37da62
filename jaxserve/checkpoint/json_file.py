"""JSON that came with a checkpoint: parsed strictly, its faults told in one line."""

import json
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # also safetensors' own limit of a header; an index of 100,000 tensors takes 10 MB


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text`` (UTF-8): no duplicate key, no NaN or infinity, no nesting beyond Python's stack.

    Raises:
        CheckpointError: starting with ``what``.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except ValueError as e:  # bad UTF-8, bad JSON, an integer of thousands of digits, or one of the hooks below
        raise CheckpointError(f"{what} is not valid JSON: {' '.join(str(e).split())[:120]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object but {shown(value)}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most ``MAX_JSON_BYTES``.

    Raises:
        CheckpointError: starting with the file's name.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} has {size} bytes, at most {MAX_JSON_BYTES} are read")
        text = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path.name} cannot be read: {e.strerror or e}") from None
    return parse_json(text, path.name)


def shown(value: Any, length: int = 60) -> str:
    """A value in an error message: one short line."""
    if isinstance(value, list):
        text = f"<list of {len(value)}>" if len(value) > 4 else f"[{', '.join(shown(v, 12) for v in value)}]"
    elif isinstance(value, dict):
        text = f"<object of {len(value)} keys>"
    elif isinstance(value, int) and value.bit_length() > 200:  # printing thousands of digits is an error of its own
        text = f"<integer of {value.bit_length()} bits>"
    else:
        text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set[str]()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"key {shown(key)} appears twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
