"""A wheel built from this tree works where the tree is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGES, ROOT, modules


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed. Built from a copy: setuptools leaves its traces beside the source,
    and would pick up those of an earlier build."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source), cwd=wheels)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=wheels)
    return target


def test_every_module_imports(installed: Path):
    names = [name for name in modules() if name != "jaxserve.__main__"]
    code = (
        f"import importlib, pathlib\n"
        f"for name in {names}:\n"
        f"    file = importlib.import_module(name).__file__\n"
        f"    assert pathlib.Path(file).is_relative_to({str(installed)!r}), file\n"
    )
    run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed))


def test_console_script(installed: Path):
    out = run(str(installed / "bin" / "jaxserve"), "--help", cwd=installed.parent, PYTHONPATH=str(installed))
    assert "generate" in out and "serve" in out


def test_type_information_is_inside(installed: Path):
    assert all((installed / package / "py.typed").exists() for package in PACKAGES)
    assert sorted(p.name for p in installed.rglob("*.pyi")) == sorted(
        p.name for p in (ROOT / "jaxserve").rglob("*.pyi")
    )
