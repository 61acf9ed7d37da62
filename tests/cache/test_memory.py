"""How much of a device's memory an engine takes."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.parallel import memory

H100 = 81_559 << 20  # bytes, as its driver tells
VARIABLE, OLDER = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (VARIABLE, OLDER):
        monkeypatch.setenv(name, "")  # so that it is put back behind the test


def gpu(share: float, in_use: int = 0) -> Any:
    stats = {"bytes_limit": int(H100 * share), "bytes_in_use": in_use}
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


def test_a_command_takes_what_its_fraction_needs_and_uses_it_all(monkeypatch):
    for fraction, share in ((None, 0.93), (0.5, 0.55), (0.97, 0.98)):
        monkeypatch.setenv(VARIABLE, "")
        memory.reserve(fraction)
        assert float(memory.os.environ[VARIABLE]) == share
    monkeypatch.setenv(VARIABLE, "")
    memory.reserve(None)
    weights, workspace, token = 16_060_522_496, 2_000_000_000, 128 * 1024  # of an 8B model in bfloat16
    free = memory.free_bytes(gpu(0.93, weights), 0.88)
    assert free == pytest.approx(0.88 * H100 - weights, rel=1e-6)
    assert (free - workspace) // token > 430_000


@pytest.mark.parametrize("name", [VARIABLE, OLDER])
def test_what_the_user_has_set_stays_and_limits(monkeypatch, name):
    monkeypatch.setenv(name, "0.6")
    memory.reserve(0.88)
    assert memory.os.environ[name] == "0.6" and not memory.os.environ[{VARIABLE: OLDER, OLDER: VARIABLE}[name]]
    assert memory.free_bytes(gpu(0.6), 0.88) == pytest.approx(0.95 * 0.6 * H100, rel=1e-6)
    assert memory.free_bytes(gpu(0.6), 0.4) == pytest.approx(0.4 * H100, rel=1e-6)


def test_inside_a_program_xla_has_taken_three_quarters():
    assert memory.free_bytes(gpu(0.75, 10), 0.88) == pytest.approx(0.95 * 0.75 * H100 - 10, rel=1e-6)
    assert memory.free_bytes(gpu(0.75), 0.5) == pytest.approx(0.5 * H100, rel=1e-6)


def test_a_tpu_has_no_share():
    stats = {"bytes_limit": 1000, "bytes_in_use": 100}
    assert memory.free_bytes(SimpleNamespace(platform="tpu", memory_stats=lambda: stats), 0.5) == 400
