"""The soak on the fake engine's server: that it finds a flat server flat, and sees what is not."""

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.loadtest import soak
from jaxserve.loadtest.process import Served
from tests.server.conftest import endless_engine, serving

NEED_AN_ENGINE = ("grpc structured", "grpc stall", "http stall", "killed")
WEIGHTS = {name: weight for name, weight in soak.WEIGHTS.items() if name not in NEED_AN_ENGINE}
ROW = {"num_clients": 1000, "rss_mib": 400.0, "num_files": 20, "num_threads": 9}
ROW |= {"num_pages_held": 0, "num_open": 0, "recompilations": 0}


def test_complaints():
    assert soak.complaints([ROW, ROW | {"rss_mib": 404.0, "num_files": 19, "num_clients": 2000}], 4.0) == []
    [memory] = soak.complaints([ROW, ROW | {"rss_mib": 404.5, "num_clients": 2000}], 4.0)
    assert memory == "memory: 4.5 MiB more after 1000 clients, 4.6 KiB each; allowed: 4.0"
    for name in ("num_files", "num_threads", "num_pages_held", "num_open", "recompilations"):
        [complaint] = soak.complaints([ROW, ROW | {name: ROW[name] + 1}], 4.0)
        assert complaint.startswith(f"{name}: ")


async def test_a_flat_server_is_flat_and_what_is_left_is_seen(monkeypatch: pytest.MonkeyPatch):
    """This process is the server's, too: what the test leaves in it, the server has left."""
    monkeypatch.setattr(soak, "SETTLE_S", 3.0)
    may_end = threading.Event()
    left: list[object] = []

    def leave(rows: Sequence[soak.Row]) -> None:
        if len(rows) == 3:
            left.append(open("/dev/null"))  # noqa: SIM115
            left.append(b"\1" * (256 * 2**20))  # more than a client's own memory here goes up and down
            threading.Thread(target=may_end.wait).start()

    # The loop's pool makes threads as they are wanted: of few that read requests, one may be wanted after the warm-up.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with serving(endless_engine(), http_port=0) as s:
        served = Served(s.target, s.url, os.getpid(), {"device": "here"})
        try:
            rows = await soak.soak(served, 100, 300, 20, 3, 0, leave, WEIGHTS)
        finally:
            may_end.set()
    assert [row["num_clients"] for row in rows] == [100, 200, 300, 400]
    assert sum(rows[-1]["outcomes"].values()) == 400 and rows[-1]["device"] == "here"
    assert soak.complaints(rows[1:3], 128.0) == []
    found = soak.complaints(rows[1:], 128.0)
    assert [line.split(":")[0] for line in found] == ["num_files", "num_threads", "memory"]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="num_at_once=0 must be at least 1"):
        soak.run("m", num_at_once=0)
    with pytest.raises(ValueError, match="num_clients=4 is less than num_rows=5"):
        soak.run("m", num_clients=4)
