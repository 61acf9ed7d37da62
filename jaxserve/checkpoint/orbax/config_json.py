"""``ModelConfig`` as JSON and back, exactly: nested dataclasses, tuples and None included."""

import dataclasses
import types
import typing
from typing import Any, Literal

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.config import ModelConfig


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Every field by name, for ``json.dumps``: tuples become lists, nested dataclasses objects."""
    return dataclasses.asdict(config)


def config_from_json(values: Any) -> ModelConfig:
    """The config that ``config_to_json`` was given. A field left out has its default.

    Raises:
        CheckpointError: a field that this version does not know, or a value of the wrong type, by its path.
    """
    return _decode(ModelConfig, values, "config")


def _decode(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        if value is None and types.NoneType in arguments:
            return None
        (hint,) = (a for a in arguments if a is not types.NoneType)
        return _decode(hint, value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise CheckpointError(f"{path} must be a list, not {_shown(value)}")
        return tuple(_decode(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise CheckpointError(f"{path}={_shown(value)} is not one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise CheckpointError(f"{path} must be {getattr(hint, '__name__', hint)}, not {_shown(value)}")
    return value


def _decode_fields(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be an object, not {_shown(value)}")
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise CheckpointError(f"{path}.{name}={_shown(value[name])} is not known to this version of jaxserve")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise CheckpointError(f"{path}.{field.name} is missing")
    decoded = {name: _decode(hints[name], v, f"{path}.{name}") for name, v in value.items()}
    try:
        return kind(**decoded)
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
