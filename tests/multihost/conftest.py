"""Processes of two virtual CPU devices each, which talk over loopback."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",  # the last one counts
    "JAX_PLATFORMS": "cpu",
}


def free_port() -> int:
    """One of two neighbours that nobody listens on. Not of those that the system hands out (from 32768 on): before the
    process that is told of it listens there, a connection of another test could have been given it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000, 2)
        try:
            for neighbour in (port, port + 1):
                socket.create_server(("127.0.0.1", neighbour)).close()
        except OSError:
            continue
        return port


@contextmanager
def processes(*commands: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The running commands, each ``python -m`` and the arguments. Killed at the end if still there."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()
