"""What a follower reads beside its steps; without other processes."""

import queue
import threading
from types import SimpleNamespace
from typing import Any

from jaxserve.engine.mirror import Follower

TIMEOUT_S = 60.0


def test_what_the_leader_does_not_want_any_more_is_dropped_though_it_comes_late():
    """It gives up what another process could not read, and orders the next."""
    may_read = {name: threading.Event() for name in ("failed elsewhere", "next")}

    def read_params(name: str) -> Any:
        assert may_read[name].wait(TIMEOUT_S)
        return f"of {name}"

    said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    leader = SimpleNamespace(send=lambda kind, header: said.put(header))
    anything: Any = SimpleNamespace(peers=[leader])
    follower = Follower(anything, anything, read_params, read_adapter=anything)
    for number, name in enumerate(may_read):
        follower._read_files(number, [], name, None)
    for number, event in enumerate(may_read.values()):
        event.set()
        assert said.get(timeout=TIMEOUT_S) == {"number": number, "error": None, "is_refusal": False}
    assert follower._kept == {1: "of next"}
