#!/usr/bin/env bash
# From a machine with Python >= 3.12 to an answer streamed over gRPC: installs into .venv, starts a server on loopback
# with the default model, asks it one question, stops it. Usage: quickstart.sh [QUESTION]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

question=${1:-"Why is the sky blue? Answer in two sentences."}
compiled="${XDG_CACHE_HOME:-$HOME/.cache}/jaxserve" # what was compiled once is read from here at the next start
patience=300                                        # seconds until the server must be ready, on a slow machine

server="" waiter=""
work=$(mktemp -d)
clean_up() {
    if [ -n "$server" ] && kill -TERM "$server" 2>/dev/null; then
        for _ in $(seq 100); do # ten seconds to stop by itself
            kill -0 "$server" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$server" 2>/dev/null || true
    fi
    if [ -n "$waiter" ]; then kill "$waiter" 2>/dev/null || true; fi
    wait # for both to be gone
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

install_jaxserve

say "starting a server on loopback with $DEFAULT_MODEL (Ctrl-C stops it)"
# Short sequences and one prompt size: less to allocate and to compile than the defaults, and enough for a question.
"$VENV/bin/jaxserve" serve "$DEFAULT_MODEL" --host 127.0.0.1 --grpc-port 0 --port-file "$work/port" \
    --max-model-len 2048 --prefill-sizes 64 --compilation-cache-dir "$compiled" </dev/null &
server=$!
until [ -s "$work/port" ]; do
    kill -0 "$server" 2>/dev/null || fail "the server stopped before it listened; its message is above"
    sleep 0.1
done
address="127.0.0.1:$(cat "$work/port")"
"$VENV/bin/jaxserve" client health --server "$address" --wait "$patience" >"$work/health" &
waiter=$!
while kill -0 "$waiter" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || fail "the server stopped while it was loading; its message is above"
    sleep 0.1
done
wait "$waiter" || fail "the server did not become ready"

say "asking it: $question"
"$VENV/bin/jaxserve" client chat --server "$address" --prompt "$question" --temperature 0 --max-tokens 128 --stats

say "stopping the server"
kill -TERM "$server"
status=0
wait "$server" || status=$?
server=""
[ "$status" -eq 0 ] || fail "the server exited with status $status"
say "done in $SECONDS s"
