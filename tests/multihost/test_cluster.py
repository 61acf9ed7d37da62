"""Processes that find each other, or do not: here threads, each with its own sockets; without JAX."""

import queue
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxserve.multihost.cluster import Cluster, ClusterError, Timeouts, join
from jaxserve.multihost.connection import Connection, Lost, Refused, prove_follower
from jaxserve.multihost.process import Process
from tests.multihost.conftest import free_port

FACTS = {"model": "m", "jax": "1"}
QUICK = Timeouts(start_s=2.0, heartbeat_s=1.0, building_s=1.0)


def joined(count: int, *others: Callable[[int, str], Any], timeouts: Timeouts = QUICK) -> list[Any]:
    """What each process got: its cluster or its error. ``others`` are followers that do something else."""
    port = free_port()
    where = f"127.0.0.1:{port}"

    def one(index: int) -> Cluster:
        return join(Process(index, count, where), FACTS, b"t", timeouts)

    with ThreadPoolExecutor(count + len(others)) as pool:
        futures = [pool.submit(one, i) for i in range(count - len(others))]
        futures += [pool.submit(f, count - len(others) + i, where) for i, f in enumerate(others)]
        return [future.exception() or future.result() for future in futures]


def with_(facts: dict[str, Any] = FACTS, token: bytes = b"t", index: int | None = None, count: int = 2):
    return lambda i, where: join(Process(i if index is None else index, count, where), facts, token, QUICK)


def close(found: list[Any]) -> None:
    for cluster in reversed(found):
        if isinstance(cluster, Cluster):
            cluster.close()


def test_orders_arrive_in_their_order_with_their_arrays():
    leader, *followers = found = joined(3)
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((0, 4), np.int32), np.array(-5, np.int32)]
    leader.order("one", [1, "a", True], arrays)
    leader.order("two")
    for follower in followers:
        name, arguments, came = follower.next_order()
        assert (name, arguments) == ("one", [1, "a", True])
        assert [(x.shape, x.tolist()) for x in came] == [(x.shape, x.tolist()) for x in arrays]
        assert follower.next_order() == ("two", [], [])
    leader.close()
    assert [follower.next_order() for follower in followers] == [None, None]
    close(found)


def test_the_least_number_of_all():
    found = joined(3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(Cluster.minimum, found, (7, 5, 9))) == [5, 5, 5]
    close(found)


def test_who_is_missing_is_named():
    leader, follower, _ = joined(3, lambda index, where: None, timeouts=Timeouts(start_s=1.0))
    assert isinstance(leader, ClusterError) and "process 2 of 3 did not come to 127.0.0.1:" in str(leader)
    assert "within 1 s" in str(leader)
    assert isinstance(follower, Refused) and str(follower) == str(leader)  # it is told, too


def test_a_leader_that_is_not_there():
    port = free_port()
    with pytest.raises(ClusterError, match=rf"process 1 cannot reach process 0 at 127.0.0.1:{port} within 0.5 s: "):
        join(Process(1, 2, f"127.0.0.1:{port}"), FACTS, b"t", Timeouts(start_s=0.5))


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"cannot listen on {where}: "):
            join(Process(0, 2, where), FACTS, b"t", QUICK)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (with_({"model": "n", "jax": "1"}), r"process 1 \(.+\) has model=n, process 0 has model=m"),
        (with_({"model": "m"}), r"process 1 \(.+\) has jax=None, process 0 has jax=1"),
        (with_({**FACTS, "dtype": "bfloat16"}), r"has dtype=bfloat16, process 0 has dtype=None"),
        (with_(count=3), r"has num_processes=3, process 0 has num_processes=2"),
    ],
)
def test_what_differs_is_named_on_both_sides(other: Any, reason: str):
    for error in joined(2, other):
        assert isinstance(error, Refused)
        with pytest.raises(Refused, match=reason):
            raise error


def test_the_same_process_twice():
    one, *others = joined(3, with_(index=1, count=3), with_(index=1, count=3))
    assert isinstance(one, Refused) and "is here" in str(one)
    assert all(isinstance(other, Refused) for other in others)


def test_another_token_is_refused_and_told():
    leader, follower = joined(2, with_(token=b"other"))
    assert isinstance(leader, ClusterError) and "process 1 of 2 did not come" in str(leader)
    assert "refused: 127.0.0.1: its token differs from process 0's" in str(leader)
    assert isinstance(follower, Refused) and str(follower) == "its token differs from process 0's"


def test_a_leader_without_the_token_is_not_followed():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        follower = pool.submit(join, Process(1, 2, where), FACTS, b"t", QUICK)
        connection = Connection(listener.accept()[0])
        connection.send("hell", {"magic": "jaxserve-multihost-1", "challenge": "0"})
        assert connection.receive(2.0).kind == "here"
        connection.send("know", {"proof": "0" * 64})
        with pytest.raises(Refused, match="process 0 did not prove that it has this process' token"):
            follower.result()
        connection.close()


def connected(index: int, where: str) -> socket.socket:
    """To process 0, once it listens."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(Process(index, 2, where).address())
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_strangers_do_not_keep_others_out():
    def stranger_first(index: int, where: str) -> Cluster:
        with connected(index, where) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\xff" * 4096)
        return with_()(index, where)

    found = joined(2, stranger_first)
    assert all(isinstance(cluster, Cluster) for cluster in found), found
    close(found)


def silent_follower(connections: list[Connection]):
    """One that proves itself and then sends nothing."""

    def follow(index: int, where: str) -> None:
        connection = Connection(connected(index, where))
        facts = {"num_processes": "2"} | FACTS
        prove_follower(connection, b"t", {"index": index, "host": "far", "facts": facts}, 5.0)
        connections.append(connection)

    return follow


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_leader_notices_who_has_gone(is_closed: bool):
    connections: list[Connection] = []
    patient = Timeouts(start_s=QUICK.start_s)  # on a busy machine the silence could be noticed before the end
    leader, _ = joined(2, silent_follower(connections), timeouts=patient if is_closed else QUICK)
    lost: queue.SimpleQueue[ClusterError] = queue.SimpleQueue()
    leader.when_lost(lost.put)
    if is_closed:
        connections[0].close()
    error = lost.get(timeout=4.0)
    said = "the connection was closed|the connection broke" if is_closed else "nothing came for 1 s"
    with pytest.raises(ClusterError, match=rf"process 1 \(far\) is lost: ({said})"):
        raise error
    late: queue.SimpleQueue[ClusterError] = queue.SimpleQueue()
    leader.when_lost(late.put)
    assert late.get(timeout=1.0) is error  # who asks late is told, too
    leader.close()


def test_heartbeats_keep_a_quiet_cluster_together():
    found = joined(2)
    lost: queue.SimpleQueue[ClusterError] = queue.SimpleQueue()
    for cluster in found:
        cluster.when_lost(lost.put)
    time.sleep(2.5 * QUICK.heartbeat_s)
    assert lost.empty()
    close(found)
    time.sleep(0.2)
    assert lost.empty()  # a clean end is no loss


def test_who_builds_may_be_silent_for_longer_than_who_serves():
    timeouts = Timeouts(start_s=2.0, heartbeat_s=0.5, building_s=60.0)
    connections: list[Connection] = []
    leader, _ = joined(2, silent_follower(connections), timeouts=timeouts)
    lost: queue.SimpleQueue[ClusterError] = queue.SimpleQueue()
    leader.when_lost(lost.put)
    time.sleep(1.2)
    assert lost.empty()
    connections[0].send("numb", {"number": 0})
    leader.begin_serving()  # from then on, whether something comes or not
    assert "nothing came for 0.5 s" in str(lost.get(timeout=3.0))
    leader.close()
    connections[0].close()


def test_time_in_which_nobody_ran_is_no_silence():
    """As on a machine that is paused: what was to wait a tenth of a second comes back later, and then the other side
    goes on, too."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours)

    class Paused:
        _poll, _has_been = connection._poll, False

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            if self._has_been:
                return self._poll.poll(milliseconds)
            self._has_been = True
            time.sleep(0.5)
            Connection(theirs).send("beat")
            return []

    connection._poll = Paused()  # pyright: ignore[reportAttributeAccessIssue]
    assert connection.receive(0.4).kind == "beat"
    with pytest.raises(Lost, match=r"nothing came for 0\.4 s"):
        connection.receive(0.4)
    for sock in (ours, theirs):
        sock.close()


def test_a_frame_that_cannot_be_is_a_loss():
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    theirs.sendall(b"do.." + (2**31).to_bytes(4) + (0).to_bytes(4))
    with pytest.raises(Lost, match=r"a frame of 2147483648 [+] 0 bytes, at most"):
        connection.receive(1.0)
    header = b'{"shapes": [[3]]}'
    theirs.sendall(b"do.." + len(header).to_bytes(4) + (8).to_bytes(4) + header + b"\0" * 8)
    with pytest.raises(Lost, match="arrays of 3 numbers in 2"):
        connection.receive(1.0)
    for sock in (ours, theirs):
        sock.close()
