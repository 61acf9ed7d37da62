"""The processes that serve one model: they find each other, compare what they are, and notice when one has gone.

Process 0 leads. It listens, lets every other one in that proves the token and says the same facts, and sends them what
to do; they send heartbeats. All this is before and beside JAX's own service, whose errors name nobody.
"""

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.multihost.connection import Connection, Frame, Lost, Refused, prove_follower, prove_leader
from jaxserve.multihost.process import Process

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0  # of one connection, which may be a stranger's
RETRY_S = 0.1


class ClusterError(RuntimeError):
    """A process is missing, cannot be reached, or has gone; says which."""


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds. While they serve, a process that is silent for ``heartbeat_s`` is taken for dead. While they build an
    engine it is ``building_s``: tracing and compiling may keep a process from speaking for a while."""

    start_s: float = 300.0  # until all processes are there
    heartbeat_s: float = 6.0
    building_s: float = 60.0
    reply_s: float = 1800.0  # for what takes as long as loading a model

    def __post_init__(self):
        for name, least in {"start_s": 0.1, "heartbeat_s": 0.5, "building_s": 0.5, "reply_s": 1.0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def leave(reason: str) -> None:
    """Ends this process at once: a thread of it may wait for a collective that never ends."""
    with suppress(OSError, ValueError):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


class Peer:
    """A process at the other end of a connection: what it sent, and whether it is alive.

    Args:
        name: of the process, for errors.
        on_lost: called once, in a thread of this class, when the process has gone before ``end``.
    """

    def __init__(self, name: str, connection: Connection, timeouts: Timeouts, on_lost: Callable[[str], None]):
        self.name = name
        self.silence_s = timeouts.building_s  # after which it is taken for dead
        self._connection, self._timeouts, self._on_lost = connection, timeouts, on_lost
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begins to send heartbeats and to listen."""
        for run in (self._listen, self._beat):
            threading.Thread(target=run, name=f"jaxserve-{run.__name__[1:]}-{self.name}", daemon=True).start()

    def send(self, kind: str, header: dict[str, Any] | None = None, arrays: Sequence[np.ndarray] = ()) -> None:
        """Raises ClusterError where the process has gone."""
        try:
            self._connection.send(kind, header, arrays)
        except Lost as lost:
            raise ClusterError(f"{self.name}: {lost}") from None

    def take(self, kind: str | None = None, timeout_s: float | None = None) -> Frame:
        """The next frame; of ``kind``, where that is given. Raises ClusterError."""
        try:
            frame = self._frames.get(timeout=timeout_s)
        except queue.Empty:
            raise ClusterError(f"{self.name} did not answer within {timeout_s:g} s") from None
        if frame is None:
            raise ClusterError(f"{self.name} has gone")
        if kind is not None and frame.kind != kind:
            raise ClusterError(f"{self.name} sent {frame.kind!r}, expected {kind!r}")
        return frame

    def end(self) -> None:
        """From here on it may go."""
        self._ended.set()

    def close(self) -> None:
        self.end()
        self._connection.close()

    def _listen(self) -> None:
        try:
            while True:
                frame = self._connection.receive(lambda: self.silence_s)
                if frame.kind == "bye.":
                    self.end()
                if frame.kind != "beat":
                    self._frames.put(frame)
        except Lost as lost:
            self._frames.put(None)
            if not self._ended.is_set():
                self._on_lost(f"{self.name} is lost: {lost}")

    def _beat(self) -> None:
        with suppress(Lost):  # the listener tells
            while not self._ended.wait(self._timeouts.heartbeat_s / 6):
                self._connection.send("beat")


class Cluster:
    """This process among the others; made by ``join``.

    Attributes:
        process: this one.
        peers: of the leader every follower, by index; of a follower the leader.
    """

    def __init__(self, process: Process, timeouts: Timeouts):
        self.process, self.timeouts = process, timeouts
        self.peers: list[Peer] = []
        self._lost_lock = threading.Lock()
        self._on_lost: Callable[[ClusterError], None] = lambda error: leave(str(error))
        self._loss: ClusterError | None = None
        self._has_lost = threading.Event()
        self._ordering = threading.Lock()
        self._next_number = 0  # of orders

    def when_lost(self, call: Callable[[ClusterError], None]) -> None:
        """Has ``call`` told, in another thread and once, when a process has gone; without one this process ends.
        After ``call`` the process should end soon: a thread of it may wait for a collective that never ends."""
        with self._lost_lock:
            self._on_lost = call
            loss = self._loss
        if loss is not None:
            call(loss)

    def add(self, name: str, connection: Connection) -> None:
        """A process that has proved itself. Before ``start``."""
        self.peers.append(Peer(name, connection, self.timeouts, self._lose))

    def _lose(self, reason: str) -> None:
        with self._lost_lock:
            if self._loss is not None:
                return
            self._loss = ClusterError(reason)
            self._has_lost.set()
            call = self._on_lost
        call(self._loss)

    def wait_for_loss(self) -> ClusterError | None:
        """Which process has gone, for whoever sees only what follows from it; None: within the time in which that is
        noticed, none has."""
        self._has_lost.wait(self.timeouts.heartbeat_s + 1)
        return self._loss

    def begin_building(self) -> None:
        """An engine is built now, here and on the others."""
        for peer in self.peers:
            peer.silence_s = max(self.timeouts.building_s, self.timeouts.heartbeat_s)

    def begin_serving(self) -> None:
        """Waits until all have built their engine; all of them call it."""
        self.minimum(0)
        for peer in self.peers:
            peer.silence_s = self.timeouts.heartbeat_s

    def minimum(self, number: int) -> int:
        """The least of all processes' numbers; all of them call it."""
        if self.process.leads:
            least = min([number, *(int(f.header["number"]) for f in self.replies("numb"))])
            self.tell_all("numb", {"number": least})
            return least
        self.peers[0].send("numb", {"number": number})
        return int(self.peers[0].take("numb", self.timeouts.reply_s).header["number"])

    def replies(self, kind: str) -> list[Frame]:
        """One frame of each follower, in their order."""
        return [peer.take(kind, self.timeouts.reply_s) for peer in self.peers]

    def tell_all(self, kind: str, header: dict[str, Any] | None = None) -> None:
        for peer in self.peers:
            peer.send(kind, header)

    def order(self, name: str, arguments: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()) -> None:
        """Has every follower do what ``name`` says, after all that was ordered before. Leader only; any thread."""
        with self._ordering:
            header = {"n": self._next_number, "op": name, "args": arguments}
            self._next_number += 1
            for peer in self.peers:
                peer.send("do..", header, arrays)

    def next_order(self) -> tuple[str, list[Any], list[np.ndarray]] | None:
        """Waits for what the leader orders: name, arguments, arrays. None: it has ended. Followers only.

        Raises ClusterError for a frame that is not the next order.
        """
        (leader,) = self.peers
        frame = leader.take()
        if frame.kind == "bye.":
            return None
        number = frame.header.get("n")
        if frame.kind != "do.." or number != self._next_number:
            raise ClusterError(f"{leader.name} sent {frame.kind!r} {number}, expected order {self._next_number}")
        self._next_number += 1
        return frame.header["op"], frame.header["args"], frame.arrays

    def close(self) -> None:
        """Ends the connections; on the leader that is the followers' end, too. Safe to call twice."""
        for peer in self.peers:
            peer.end()
            with suppress(ClusterError):
                peer.send("bye.")
            peer.close()
        self.peers = []


def join(process: Process, facts: Mapping[str, Any], token: bytes, timeouts: Timeouts) -> Cluster:
    """Waits until all processes are there.

    Args:
        facts: that must be the same in all processes: versions, model, mesh, options.

    Raises:
        ClusterError: a process did not come in time, or the leader cannot be reached; says which.
        Refused: two processes differ; names the fact and both values.
    """
    if not token and process.leads and process.address()[0] not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("multihost: without a token whoever reaches %s may be one of the processes", process.coordinator)
    facts = {"num_processes": str(process.count)} | {name: str(value) for name, value in facts.items()}
    cluster = (_gather if process.leads else _reach)(process, facts, token, timeouts)
    for peer in cluster.peers:
        peer.start()
    return cluster


def _gather(process: Process, facts: dict[str, str], token: bytes, timeouts: Timeouts) -> Cluster:
    cluster, here = Cluster(process, timeouts), dict[int, tuple[str, Connection]]()
    deadline, strangers = time.monotonic() + timeouts.start_s, list[str]()
    host, port = process.address()
    try:
        listener = socket.create_server((host, port), family=_family(host, port), backlog=process.count)
    except OSError as error:
        raise ClusterError(f"process 0 cannot listen on {process.coordinator}: {error.strerror or error}") from None
    with listener:
        while len(here) < process.count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                sock, address = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, process.count) if i not in here]
                were = f"; refused: {'; '.join(strangers[-3:])}" if strangers else ""
                reason = (
                    f"process {', '.join(missing)} of {process.count} did not come to {process.coordinator} "
                    f"within {timeouts.start_s:g} s{were}"
                )
                _refuse_all(here, reason)
                raise ClusterError(reason) from None
            connection = Connection(sock)
            try:
                about = prove_leader(connection, token, HANDSHAKE_TIMEOUT_S)
                index = about["index"]
                name = f"process {index} ({about['host']})"
                theirs = about["facts"]
            except (Lost, Refused, KeyError, TypeError) as error:
                logger.warning("multihost: refused a connection from %s: %s", address[0], error)
                strangers.append(f"{address[0]}: {error}")
                connection.close()
                continue
            reason = _difference(name, theirs, facts)
            if reason is None and (index in here or not isinstance(index, int) or not 0 < index < process.count):
                others = f"{here[index][0]} is here" if index in here else f"there are 1 to {process.count - 1}"
                reason = f"{name}: {others}"
            if reason is not None:
                _refuse_all({**here, -1: (name, connection)}, reason)
                raise Refused(reason)
            here[index] = (name, connection)
            logger.info("multihost: %s is here, %d of %d", name, len(here) + 1, process.count)
    for index in sorted(here):
        cluster.add(*here[index])
    cluster.tell_all("all.")
    return cluster


def _refuse_all(here: Mapping[int, tuple[str, Connection]], reason: str) -> None:
    for _, connection in here.values():
        with suppress(Lost):
            connection.send("refu", {"reason": reason})
        connection.close()


def _difference(name: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    for fact in dict.fromkeys((*ours, *theirs)):
        if theirs.get(fact) != ours.get(fact):
            return f"{name} has {fact}={theirs.get(fact)}, process 0 has {fact}={ours.get(fact)}"
    return None


def _reach(process: Process, facts: dict[str, str], token: bytes, timeouts: Timeouts) -> Cluster:
    deadline = time.monotonic() + timeouts.start_s
    about = {"index": process.index, "host": socket.gethostname(), "facts": facts}
    while True:
        try:
            connection = Connection(socket.create_connection(process.address(), timeout=HANDSHAKE_TIMEOUT_S))
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"process {process.index} cannot reach process 0 at {process.coordinator} "
                    f"within {timeouts.start_s:g} s: {error.strerror or error}"
                ) from None
            time.sleep(RETRY_S)
    try:
        prove_follower(connection, token, about, HANDSHAKE_TIMEOUT_S)
        said = connection.receive(timeouts.start_s + HANDSHAKE_TIMEOUT_S)
    except Lost as lost:
        raise ClusterError(f"process 0 at {process.coordinator}: {lost}") from None
    if said.kind != "all.":
        raise Refused(str(said.header.get("reason")))
    cluster = Cluster(process, timeouts)
    cluster.add(f"process 0 ({process.coordinator})", connection)
    return cluster


def _family(host: str, port: int) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        return socket.AF_INET  # binding says what is wrong
