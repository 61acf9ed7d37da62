"""Counts what JAX traces or compiles in the code under watch: after ready it must be nothing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax.monitoring

_EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")


class CompileCounter:
    """``count`` of traces and compilations inside ``watch()`` blocks, of the thread that is in the block only:
    JAX's events are of the whole process, and a user's own program may compile beside the engine."""

    def __init__(self):
        self.count = 0
        self._watching: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS and threading.get_ident() == self._watching:
            self.count += 1

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._watching = threading.get_ident()
        try:
            yield
        finally:
            self._watching = None

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
