"""A process whose device is left unusable by a test ends with it; the other tests run in another."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
from tests import device_guard

broken = []
device_guard.is_usable = lambda: not broken

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: as ours")
    config.pluginmanager.register(device_guard.DeviceGuard())
"""
TESTS = """
import conftest
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("number", range(8))
def test_that_needs_the_device(number):
    assert not conftest.broken
    assert number != 1
    if number == 3:
        conftest.broken.append(number)
        raise RuntimeError("an address that is not there")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, passed", [(["-n", "2", "--max-worker-restart", "2"], 6), ([], 2)], ids=["two", "alone"]
)
def test_of_processes(tmp_path: Path, options: list[str], passed: int):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    names = {line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")}
    assert names == {f"FAILED test_it.py::test_that_needs_the_device[{n}]" for n in (1, 3)}, done.stdout
    assert re.search(rf"\b{passed} passed", done.stdout), done.stdout
