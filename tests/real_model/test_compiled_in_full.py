"""The tests of this folder's other files, in processes whose programs are compiled as users have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(2000)  # a busy machine compiles and runs slowly
@pytest.mark.parametrize("name", ["smollm2", pytest.param("split_models", marks=pytest.mark.slow)])
def test_compiled_in_full(name: str):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("PYTEST_")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "false"  # tests/conftest.py then leaves the emitters, too
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", f"tests/real_model/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary, done.stdout
    if "skipped" in summary:
        pytest.skip(f"{summary}: a model that is not here")
