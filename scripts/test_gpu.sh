#!/usr/bin/env bash
# Every test that needs a GPU, on this machine's. Arguments go to pytest.
# Needs jax with its CUDA plugin, flax, numpy, pytest, pytest-asyncio, pytest-timeout and pytest-xdist, in .venv or
# PYTHON's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
"$PYTHON" -c '
import sys, jax
device = jax.devices()[0]
print(f"==> {len(jax.devices())} x {device.device_kind}, jax {jax.__version__}")
sys.exit(0 if device.platform == "gpu" else "error: jax finds no GPU here")'
# Their files alone are read: others import what a machine that only computes need not have.
mapfile -t FILES < <(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests | sort)
# Most of the time is compiling, a core for each test: processes share the GPU, each with the memory that it uses.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
CORES=$(nproc)
# A kernel that hangs cannot be interrupted, and one that reads where nothing is leaves its process unable to compute:
# the process ends with the test, and another takes its place.
exec "$PYTHON" -m pytest -m gpu -n $((CORES > 16 ? 12 : (CORES * 3 + 3) / 4)) --max-worker-restart 8 \
    --timeout 200 --timeout-method thread "${FILES[@]}" "$@"
