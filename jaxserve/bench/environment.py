"""What a figure was measured on and with, so that it can be measured again."""

import os
import platform
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jaxserve


def environment() -> dict[str, Any]:
    """``device`` in words, its ``driver``, ``versions`` by name, and the source's ``commit``. No host name, no path."""
    names = ("jax", "jaxlib", "numpy")
    versions = {"jaxserve": jaxserve.__version__, "python": platform.python_version()}
    return {
        "device": device_in_words(),
        "driver": driver_version(),
        "versions": versions | {name: version(name) for name in names},
        "commit": source_commit(),
    }


def device_in_words() -> str:
    """``2-core x86-64 CPU``, or the accelerators' number and kind as jax names it."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    # What this process may use, which in a container is less than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core {platform.machine().replace('_', '-')} CPU"


def driver_version() -> str | None:
    """NVIDIA's driver, where jax runs on it."""
    if jax.local_devices()[0].platform != "gpu":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def command_line(benchmark: str, model: str | None, options: dict[str, Any]) -> str:
    """The command line that asks for these options. No path: the file's name stands for it, and a cache is no part."""
    words = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name, value in options.items()
        if name != "compilation_cache_dir"
    ]
    return shlex.join(["jaxserve", "bench", benchmark, *([] if model is None else [Path(model).name]), *words])


def source_commit() -> str | None:
    """The commit of the checkout that jaxserve runs from, ``+changes`` after it where jaxserve or its kernels differ
    from that commit; None outside a checkout."""
    root = Path(jaxserve.__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside another project's checkout is not a checkout of jaxserve.
    if git("ls-files", "--error-unmatch", "jaxserve/__init__.py") is None:
        return None
    changed = git("status", "--porcelain", "--", "jaxserve", "pallas_kernels")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+changes' if changed else ''}"
