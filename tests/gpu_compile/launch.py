"""Runs ``compile_all`` in a process that sees the CUDA wheels, which nothing else here does.

    python -m tests.gpu_compile.launch [NAME ...]      the report of these cases, or of all

The wheels are the extra ``cuda-compile``, in a folder of their own beside the environment's packages: a CUDA plugin on
the usual path would be loaded by every process that imports jax. They need no driver and no GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu_compile.cases import APPENDS, KERNELS, PRODUCTS, STEPS

ROOT = Path(__file__).parents[2]
WHEELS = Path(sys.prefix) / "cuda-compile"
HOW_TO_INSTALL = (
    "`bash scripts/test.sh` installs it; by hand: pip install --no-deps -c constraints.txt "
    f"--target {WHEELS} jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm"
)


def is_installed() -> bool:
    """Whether jax can compile for CUDA here, with what ``WHEELS`` has or without."""
    return (WHEELS / "jax_plugins").is_dir() or find_spec("jax_cuda13_plugin") is not None


def compile_report(names: Sequence[str] = (), *, show: bool = False) -> dict[str, dict[str, Any]]:
    """What ``compile_all`` reports of the named cases, or of all; its output goes on to ours if ``show``.

    Two processes share the cases: most of the compiling uses one core.
    """
    names = names or [*KERNELS, *PRODUCTS, *APPENDS, *STEPS]
    shares = [share for share in (names[0::2], names[1::2]) if share]
    with ThreadPoolExecutor(len(shares)) as pool:
        reports = list(pool.map(lambda share: _compile(share, show), shares))
    return {name: found for report in reports for name, found in report.items()}


def _compile(names: Sequence[str], show: bool) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="jaxserve-gpu-compile-") as folder:
        out, dump = Path(folder) / "report.json", Path(folder) / "dump"
        dump.mkdir()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(WHEELS)]),
            "JAX_PLATFORMS": "cpu",  # the plugin is to compile, not to look for a device
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache is not compiled
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",  # what ships
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            # Level 0: choosing the fastest of several kernels needs a device to time them on.
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_dump_to={dump}",
        }
        command = [sys.executable, "-m", "tests.gpu_compile.compile_all", str(out), str(dump), *names]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=not show, text=True, timeout=500, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {(done.stderr or '')[-4000:]}")
        return json.loads(out.read_text())


if __name__ == "__main__":
    if not is_installed():
        sys.exit(f"no CUDA compiler: {HOW_TO_INSTALL}")
    compile_report(sys.argv[1:], show=True)
