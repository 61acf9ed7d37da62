#!/usr/bin/env bash
# Lint, formatting, types and the whole test suite. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_jaxserve dev
required=()
if [ "$(uname -s)" = Linux ]; then
    install_compiler cuda
    required+=(--require-cuda-compiler)
fi
if [ "$(uname -sm)" = "Linux x86_64" ]; then # the one that it is made for
    install_compiler tpu
    required+=(--require-tpu-compiler)
fi
cd "$ROOT"
say "ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
say "pyright"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
SHOWN_ON_FAILURE=+1 # every finding
with_progress "$VENV/pyright.log" .venv/bin/pyright --pythonpath .venv/bin/python
say "pytest"
# A file's tests share engines, so a file goes to one process; in the order of their names, as files of few tests that
# take long would else be left to the end, and to one process. One that crashes ends the run: with a new one in its
# place the run would wait for ever for the tests of the first.
ONE_PROCESS_A_FILE=(--dist loadfile --no-loadscope-reorder --max-worker-restart 0)
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 "${ONE_PROCESS_A_FILE[@]}" ${required[@]+"${required[@]}"} "$@"
