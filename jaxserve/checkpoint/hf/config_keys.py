"""The keys of a config.json, each of which must be used, known to change nothing, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError
from jaxserve.checkpoint.json_file import shown

MAX_SIZE = 2**31 - 1
REQUIRED = object()


class ConfigKeys:
    """A JSON object read key by key: every method takes keys, ``refuse_rest`` tells of those that nothing took.

    The typed methods take null as absent, and raise ``CheckpointError`` for a value that is not what they say.

    Args:
        values: the object.
        where: prefix of its keys in messages.
        defaults: what an absent key means.
        renamed: another name of a key -> its name here. Both may be there if they say the same.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str = "",
        defaults: Mapping[str, Any] | None = None,
        renamed: Mapping[str, str] | None = None,
    ):
        self.where = where
        self._values: dict[str, Any] = {}
        self._named: dict[str, str] = {}  # our name -> what the file calls it
        self._defaults = defaults or {}
        self._taken = set[str]()
        for key, value in values.items():
            name = (renamed or {}).get(key, key)
            if name in self._values and not _same(value, self._values[name]):
                other = f"{self._shown(name)}={shown(self._values[name])}"
                raise CheckpointError(f"{where}{key}={shown(value)} contradicts {other}")
            self._values[name] = value
            self._named.setdefault(name, key)

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """The key's value as it stands; the default where the key is absent, not where it is null."""
        self._taken.add(key)
        if key in self._values:
            return self._values[key]
        return self._defaults.get(key, default)

    def _present(self, key: str, default: Any) -> Any:
        """The key's value; a default where it is absent or null."""
        value = self.take(key)
        value = self._defaults.get(key) if value is None else value
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self._shown(key)} is missing")
        return value

    def _shown(self, key: str) -> str:
        """As the file calls it; a key may be any text."""
        name = self._named.get(key, key)
        return self.where + (name if name.isprintable() and len(name) <= 60 else shown(name))

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._shown(key)}={shown(value)}: expected {expected}")

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self._present(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, value, f"an integer in [{least}, {most}]")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self.take(key) is None else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._present(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e300 or not math.isfinite(value):
            raise self.error(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.take(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses any value of the key but ``allowed`` and null."""
        value = self._values.get(key)
        self._taken.add(key)
        if value is not None and not any(_same(value, a) for a in allowed):
            known = " or ".join(map(repr, allowed)) or "null"
            raise CheckpointError(f"{self._shown(key)}={shown(value)} is not supported, only {known}")

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` positive numbers."""
        value = self.take(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, value, f"a list of {length} numbers")
        if not all(type(v) in (int, float) and 0 < v < 1e300 for v in value):
            raise self.error(key, value, "positive numbers only")
        return tuple(map(float, value))

    def refuse_rest(self, neutral: frozenset[str] = frozenset()) -> None:
        """Raises for the first key that nothing took and that is not ``neutral``; null says nothing."""
        for key, value in self._values.items():
            if key not in self._taken and key not in neutral and value is not None:
                raise CheckpointError(f"{self._shown(key)}={shown(value)} is not supported")


def _same(a: Any, b: Any) -> bool:
    """Equal, and not merely as True equals 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
