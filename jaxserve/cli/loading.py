"""From a model's name and the engine options to an engine that is ready, with its start-up shown."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxserve.cli.options import EngineOptions
from jaxserve.cli.terminal import ProgressDisplay

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

INTERRUPTED = 128 + signal.SIGINT


def open_engine(model: str, options: EngineOptions) -> "Engine":
    """The engine of a command, in whichever thread it is to live.

    Raises:
        ValueError: an option or the checkpoint is wrong (``CheckpointError``).
        RuntimeError: there are no devices of the platform.
    """
    keywords = options.keywords()
    with ProgressDisplay() as progress, leaving_at_interrupt(progress):
        progress("import jax", 0, None)
        select_platform(options.platform, options.memory_fraction)
        check_devices(options.platform)
        from jaxserve.engine.engine import Engine

        return Engine.from_pretrained(model, on_progress=progress, **keywords)


def select_platform(platform: str | None, memory_fraction: float | None = None) -> None:
    """Imports jax and, with a ``platform``, has it use no other; of a GPU's memory XLA takes what an engine of this
    ``memory_fraction`` needs (None: its default). Before jax has looked for devices."""
    import jax

    from jaxserve.parallel.memory import reserve

    reserve(memory_fraction)
    if platform is not None:
        jax.config.update("jax_platforms", platform)


def check_devices(platform: str | None) -> None:
    """RuntimeError where jax finds no devices of the ``platform``; of some it says so by a failed assertion."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        if platform is None:
            raise
        raise RuntimeError(f"platform={platform!r}: jax finds no such devices here. {error}") from error


@contextmanager
def leaving_at_interrupt(progress: ProgressDisplay) -> Iterator[None]:
    """Ctrl-C in the block ends the process at once: threads inside XLA's compiler cannot be interrupted, an exception
    would wait for them, and there is nothing yet to clean up. In the main thread only, where signals go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        progress.__exit__(None, None, None)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
