"""Engines over the devices of several processes say what one process with one device says."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.multihost.conftest import free_port, processes
from tests.multihost.worker import Checkpoint, build, work


@cache
def expected() -> dict[str, Any]:
    checkpoint = Checkpoint()
    with build(checkpoint) as engine:
        return work(engine) | {"bytes": sum(checkpoint.sizes)}


START_S = 280.0  # a busy machine compiles slowly


# Two processes have one half of every layer each, then half of the layers each; four have quarters of layers, too.
@pytest.mark.timeout(START_S + 20)
@pytest.mark.parametrize(("count", "meshes"), [(2, "tensor=4;stage=2,tensor=2"), (4, "stage=2,tensor=4")])
def test_several_processes_say_the_same(count: int, meshes: str, tmp_path: Path):
    out, port = tmp_path / "found.json", free_port()
    commands = [["tests.multihost.worker", *map(str, (i, count, port, meshes, out))] for i in range(count)]
    with processes(*commands) as started:
        assert expected()["preempted"]
        assert expected()["cached"][0] > 0
        ends = [(process.communicate(timeout=START_S)[0], process.returncode) for process in started]
    assert [status for _, status in ends] == [0] * count, ends
    found = json.loads(out.read_text())
    assert set(found) == set(meshes.split(";"))
    whole = expected()["bytes"]
    for mesh, said in found.items():
        assert said | {"bytes": whole} == expected(), mesh
        # Each read what its devices hold, and that is little more than its share: norms are everywhere.
        for index in range(count):
            sizes = json.loads((tmp_path / f"sizes{index}.json").read_text())[mesh]
            # A norm that is on all devices of a stage is read for each.
            assert sizes["own"] <= sizes["read"] <= 1.01 * sizes["own"]
            assert sizes["read"] < 1.04 / count * whole
