"""Runs ``compile_all`` in a process that sees the TPU compiler, which nothing else here does.

    python -m tests.tpu_compile.launch [NAME ...]      the report of these cases, or of all

``libtpu`` is the extra ``tpu-compile``, in a folder of its own: on the usual path every process that imports jax would
look for a TPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tpu_compile.cases import STEPS

ROOT = Path(__file__).parents[2]
WHEELS = Path(sys.prefix) / "tpu-compile"
HOW_TO_INSTALL = (
    f"`bash scripts/test.sh` installs it; by hand: pip install --no-deps -c constraints.txt --target {WHEELS} libtpu"
)


def is_installed() -> bool:
    return (WHEELS / "libtpu").is_dir()


def compile_report(names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What ``compile_all`` reports of the named cases, or of all."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(WHEELS)]),
        "JAX_PLATFORMS": "cpu",  # the compiler is to compile, not to look for a device
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache is not compiled
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",  # what ships
        "XLA_FLAGS": "",
        # A machine without a TPU has nothing that would tell of one.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-m", "tests.tpu_compile.compile_all", *(names or STEPS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if not is_installed():
        sys.exit(f"no TPU compiler: {HOW_TO_INSTALL}")
    print(json.dumps(compile_report(sys.argv[1:]), indent=1))
