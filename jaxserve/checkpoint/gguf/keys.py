"""The metadata of one architecture, read by key and type."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from jaxserve.checkpoint.errors import CheckpointError


class Keys:
    """The metadata of one architecture, read by key and type; errors name the whole key and its value."""

    def __init__(self, architecture: str, metadata: Mapping[str, Any]):
        self.prefix = f"{architecture}."
        self.values = {k.removeprefix(self.prefix): v for k, v in metadata.items() if k.startswith(self.prefix)}

    def refuse(self, key: str, why: str) -> NoReturn:
        raise CheckpointError(f"metadata {self.prefix}{key}={shown(self.values.get(key))} {why}")

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least ``least``; without a default the key must be there."""
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata {self.prefix}{key} is missing")
        if type(value) is not int or (key in self.values and value < least):
            self.refuse(key, f"must be {'a positive integer' if least == 1 else f'an integer of at least {least}'}")
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """A positive number, or 0 if ``zero``; without a default the key must be there."""
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata {self.prefix}{key} is missing")
        if type(value) not in (int, float) or not 0 <= value < math.inf or (value == 0 and not zero):
            self.refuse(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "must be true or false")
        return value


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return isinstance(value, (bool, int, float, str)) and value in allowed


def shown(value: Any) -> str:
    """A metadata value in an error message: one short line."""
    text = f"<array of {len(value)}>" if isinstance(value, (list, np.ndarray)) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
