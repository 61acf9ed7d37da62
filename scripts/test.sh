#!/usr/bin/env bash
# Lint, formatting, types and the whole test suite. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_jaxserve dev
compilers=() required=()
if [ "$(uname -s)" = Linux ]; then
    compilers+=(cuda)
    required+=(--require-cuda-compiler)
fi
if [ "$(uname -sm)" = "Linux x86_64" ]; then # the one that it is made for
    compilers+=(tpu)
    required+=(--require-tpu-compiler)
fi
# More than a gigabyte, which comes while ruff and pyright read the source: neither needs more than one core. In a group
# of processes of its own, so that it ends where this script does.
set -m
for compiler in ${compilers[@]+"${compilers[@]}"}; do install_compiler "$compiler" >/dev/null; done &
installing=$!
set +m
trap 'kill -- "-$installing" 2>/dev/null || true' EXIT
cd "$ROOT"
say "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "pyright"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
SHOWN_ON_FAILURE=+1 # every finding
with_progress "$VENV/pyright.log" .venv/bin/pyright --pythonpath .venv/bin/python
say "what compiles for described devices (logs: $VENV/install-*-compile.log)"
wait "$installing"
trap - EXIT
say "pytest"
# A file's tests share engines, so a file goes to one process; in the order of their names, as files of few tests that
# take long would else be left to the end, and to one process. One that crashes ends the run: with a new one in its
# place the run would wait for ever for the tests of the first.
ONE_PROCESS_A_FILE=(--dist loadfile --no-loadscope-reorder --max-worker-restart 0)
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 "${ONE_PROCESS_A_FILE[@]}" ${required[@]+"${required[@]}"} "$@"
