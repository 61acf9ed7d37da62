"""Frames over one TCP connection between two processes, each of which has proved that it has the same token.

A frame is a kind, a JSON header and int32 arrays; what is inside is never executed. The contents are not encrypted:
the network between the hosts must be trusted with prompts.
"""

import hashlib
import hmac
import json
import math
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAGIC = "jaxserve-multihost-1"
MAX_HEADER, MAX_PAYLOAD = 1 << 20, 1 << 30  # bytes
LOOK_AGAIN_S = 0.5  # at a timeout that may have changed
LOOKS = 4  # in a timeout, at least: see ``Connection.receive``
_PREFIX = struct.Struct("!4sII")  # kind, bytes of the header, bytes of the arrays


class Lost(Exception):
    """The other side has gone, or has said nothing for too long."""


class Refused(ValueError):
    """The two sides do not belong together; says why."""


class Frame(NamedTuple):
    kind: str  # of four letters
    header: dict[str, Any]
    arrays: list[np.ndarray]  # i32


class Connection:
    """One side of a connection. One thread may receive while others send."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, kind: str, header: dict[str, Any] | None = None, arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends a frame; returns when the system has taken it. Raises ``Lost``."""
        header = dict(header or {})
        if arrays:
            header["shapes"] = [x.shape for x in arrays]
        text = json.dumps(header).encode()
        flat = [np.ascontiguousarray(x, "<i4").reshape(-1) for x in arrays]
        size = sum(x.nbytes for x in flat)
        try:
            with self._sending:  # the arrays as they lie: a step's are up to a megabyte
                self._socket.sendall(_PREFIX.pack(kind.encode("ascii"), len(text), size) + text)
                for x in flat:
                    self._socket.sendall(x)
        except OSError as error:
            raise Lost(f"the connection broke: {error.strerror or error}") from None

    def receive(self, timeout_s: float | Callable[[], float]) -> Frame:
        """The next frame. Raises ``Lost`` at the end, or where nothing comes for ``timeout_s``, which may change while
        this waits. Time in which this process was to wait and did not even run, on a machine that was paused or too
        busy, is not counted: the other side, where it is on that machine, could not send either."""
        kind, header_size, payload_size = _PREFIX.unpack(self._bytes(_PREFIX.size, timeout_s))
        if header_size > MAX_HEADER or payload_size > MAX_PAYLOAD:
            raise Lost(f"a frame of {header_size} + {payload_size} bytes, at most {MAX_HEADER} + {MAX_PAYLOAD}")
        try:
            header = json.loads(self._bytes(header_size, timeout_s))
            payload = np.frombuffer(self._bytes(payload_size, timeout_s), "<i4")
            shapes = [tuple(int(n) for n in shape) for shape in header.pop("shapes", ())]
            sizes = [math.prod(shape) for shape in shapes]
            if sum(sizes) != payload.size:
                raise ValueError(f"arrays of {sum(sizes)} numbers in {payload.size}")
            ends = np.cumsum([0, *sizes])
            arrays = [payload[a:b].reshape(s) for a, b, s in zip(ends[:-1], ends[1:], shapes, strict=True)]
            return Frame(kind.decode("ascii"), header, arrays)
        except (ValueError, TypeError, AttributeError) as error:
            raise Lost(f"a frame that cannot be read: {error}") from None

    def _bytes(self, size: int, timeout_s: float | Callable[[], float]) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        silent_s = 0.0
        while got < size:
            limit_s = timeout_s() if callable(timeout_s) else timeout_s
            wait_s = max(0.0, min(limit_s - silent_s, limit_s / LOOKS, LOOK_AGAIN_S))
            try:
                if not self._poll.poll(wait_s * 1000):
                    silent_s += wait_s
                    if silent_s >= limit_s:
                        raise Lost(f"nothing came for {limit_s:g} s")
                    continue
                count = self._socket.recv_into(view[got:])
            except OSError as error:
                raise Lost(f"the connection broke: {error.strerror or error}") from None
            if count == 0:
                raise Lost("the connection was closed")
            got += count
            silent_s = 0.0
        return data

    def close(self) -> None:
        self._socket.close()


def prove_leader(connection: Connection, token: bytes, timeout_s: float) -> dict[str, Any]:
    """The leader's side of the mutual proof; returns what the follower says of itself.

    Raises:
        Refused: no follower of ours, or its token differs.
    """
    challenge = secrets.token_hex(32)
    connection.send("hell", {"magic": MAGIC, "challenge": challenge})
    said = connection.receive(timeout_s)
    if said.kind != "here" or said.header.get("magic") != MAGIC:
        raise Refused("it is no jaxserve process of this version")
    about, answer = said.header.get("about", {}), str(said.header.get("challenge"))
    expected = _proof(token, "follower", challenge, answer, about)
    if not hmac.compare_digest(expected, str(said.header.get("proof"))):
        reason = "its token differs from process 0's"
        connection.send("refu", {"reason": reason})
        raise Refused(reason)
    connection.send("know", {"proof": _proof(token, "leader", answer, challenge, None)})
    return about


def prove_follower(connection: Connection, token: bytes, about: dict[str, Any], timeout_s: float) -> None:
    """The follower's side. Raises ``Refused`` where the leader refuses this process, or has another token."""
    hello = connection.receive(timeout_s)
    if hello.kind != "hell" or hello.header.get("magic") != MAGIC:
        raise Refused("what listens there is no jaxserve process of this version")
    challenge, answer = str(hello.header.get("challenge")), secrets.token_hex(32)
    proof = _proof(token, "follower", challenge, answer, about)
    connection.send("here", {"magic": MAGIC, "challenge": answer, "proof": proof, "about": about})
    said = connection.receive(timeout_s)
    if said.kind == "refu":
        raise Refused(str(said.header.get("reason")))
    expected = _proof(token, "leader", answer, challenge, None)
    if said.kind != "know" or not hmac.compare_digest(expected, str(said.header.get("proof"))):
        raise Refused("process 0 did not prove that it has this process' token")


def _proof(token: bytes, role: str, *said: Any) -> str:
    return hmac.new(token, json.dumps([MAGIC, role, *said], sort_keys=True).encode(), hashlib.sha256).hexdigest()
