"""One runner on every host of a mesh: what the leader's does, the followers' do, with the same inputs."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.execution.adapters import StageAdapters
from jaxserve.execution.runner import Computed, Runner
from jaxserve.execution.step import StageParams
from jaxserve.multihost.cluster import Cluster, ClusterError, Peer
from jaxserve.step_io import Bucket, Sampling, StepOutputs


class LeadingRunner(Runner):
    """A runner whose steps run on other processes' devices, too: each is ordered there before it is dispatched here.

    Args:
        cluster: of the leader.
    """

    _cluster: Cluster | None = None  # while the constructor runs: all processes warm up by themselves

    def __init__(self, cluster: Cluster, *args: Any):
        super().__init__(*args)
        self._cluster = cluster
        self._asking = threading.Lock()  # replies have an order
        self._num_asked = 0
        # What the others have read and keep for us, by number, as long as somebody has our part of it.
        self._read_elsewhere: dict[int, weakref.ref[StageParams | StageAdapters]] = {}
        self._noting = threading.Lock()  # guards it

    def _order(self, name: str, arguments: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()) -> None:
        if self._cluster is not None:
            self._cluster.order(name, arguments, arrays)

    @contextmanager
    def _naming_loss(self) -> Iterator[None]:
        """A collective's error, where a process has gone, as that: ClusterError."""
        try:
            yield
        except ClusterError:
            raise
        except Exception as error:
            loss = None if self._cluster is None else self._cluster.wait_for_loss()
            if loss is None:
                raise
            raise loss from error

    def forward(self, bucket: Bucket, buffers: np.ndarray, *, has_adapters: bool = False) -> Computed:
        self._order("forward", [bucket, has_adapters], [buffers])
        with self._naming_loss():
            return super().forward(bucket, buffers, has_adapters=has_adapters)

    def sample(self, computed: Computed, asked: Sampling, allowed: np.ndarray | None = None) -> jax.Array:
        self._order("sample", [asked], [] if allowed is None else [allowed])
        with self._naming_loss():
            return super().sample(computed, asked, allowed)

    def score(self, places: Sequence[int], ids: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        self._order("score", [[int(x) for x in places], [int(x) for x in ids]])
        return super().score(places, ids)

    def pool(self, rows: np.ndarray) -> jax.Array:
        self._order("pool", [], [rows])
        return super().pool(rows)

    def load_constraints(self, buffer: np.ndarray) -> None:
        self._order("load_constraints", [], [buffer])
        super().load_constraints(buffer)

    def read(self, handle: jax.Array) -> StepOutputs:
        self._order("read")
        with self._naming_loss():
            return super().read(handle)

    def update_params(self, params: StageParams) -> None:
        """As ``Runner.update_params``, of weights that all hosts have read (``have_read``), once."""
        number = self._take_number(params)
        if number is None:
            raise ValueError("an engine of several hosts takes other weights by load_params only, which all hosts read")
        self._order("update_params", [number])
        super().update_params(params)

    def write_adapter(self, one: StageAdapters, slot: int) -> None:
        """As ``Runner.write_adapter``, of an adapter that all hosts have read (``have_read``), once."""
        if self._cluster is not None:
            number = self._take_number(one)
            if number is None:
                raise ValueError("an engine of several hosts takes adapters by read_lora only, which all hosts read")
            self._order("write_adapter", [number, slot])
        super().write_adapter(one, slot)

    def _take_number(self, part: StageParams | StageAdapters) -> int | None:
        with self._noting:
            found = next((n for n, ref in self._read_elsewhere.items() if ref() is part), None)
            if found is not None:
                del self._read_elsewhere[found]
            return found

    def have_read(self, part: StageParams | StageAdapters, path: str | Path, digest: str | None = None) -> None:
        """Has every follower read what ``part`` is this process' part of, for ``update_params`` or ``write_adapter``.
        While they do, steps go on.

        Args:
            path: of a checkpoint, or of an adapter.
            digest: ``model.lora.adapter_digest`` of the adapter that was read here; None: it is a checkpoint.

        Raises:
            ValueError: one of them cannot, or has another adapter there; says which, and why.
        """
        assert self._cluster is not None
        with self._asking:
            with self._noting:
                self._read_elsewhere = {n: ref for n, ref in self._read_elsewhere.items() if ref() is not None}
                kept = list(self._read_elsewhere)
            number, self._num_asked = self._num_asked, self._num_asked + 1
            self._order("read_files", [number, kept, str(path), digest])
            for peer in self._cluster.peers:
                self._check_reply(peer, number)
            with self._noting:
                self._read_elsewhere[number] = weakref.ref(part)

    def _check_reply(self, peer: Peer, number: int) -> None:
        assert self._cluster is not None
        while (said := peer.take("read", self._cluster.timeouts.reply_s).header)["number"] != number:
            pass  # one that came too late
        if said["error"] is not None:
            raise (ValueError if said["is_refusal"] else RuntimeError)(f"{peer.name}: {said['error']}")

    def close(self) -> None:
        with suppress(ClusterError):  # it has gone, as it was to
            self._order("close")
        super().close()


class Follower:
    """A follower's runner, and what the leader has it do.

    Args:
        read_params: reads a checkpoint, as ``Engine.load_params``.
        read_adapter: reads an adapter, which must have the digest that is given, as ``Engine.read_lora``.
    """

    def __init__(
        self,
        runner: Runner,
        cluster: Cluster,
        read_params: Callable[[str], StageParams],
        read_adapter: Callable[[str, str], StageAdapters],
    ):
        self._runner, self._cluster = runner, cluster
        self._read_params, self._read_adapter = read_params, read_adapter
        self._computed: Computed | None = None
        self._dispatched: deque[jax.Array] = deque()
        self._kept: dict[int, Any] = {}  # what was read, by the leader's number; readers put it there at any time
        self._wanted: frozenset[int] = frozenset()  # of the numbers: all others' parts are dropped
        self._orders: dict[str, Callable[[list[Any], list[np.ndarray]], None]] = {
            "forward": self._forward,
            "sample": self._sample,
            "read": self._read,
            "score": lambda arguments, _: _ignore(runner.score(*arguments)),
            "pool": lambda _, arrays: _ignore(runner.pool(*arrays)),
            "load_constraints": lambda _, arrays: runner.load_constraints(*arrays),
            "read_files": lambda arguments, _: self._read_files(*arguments),
            "update_params": lambda arguments, _: runner.update_params(self._kept.pop(*arguments)),
            "write_adapter": self._write_adapter,
        }

    def run(self) -> None:
        """Does what the leader orders until it closes its runner, or ends."""
        while (order := self._cluster.next_order()) is not None:
            name, arguments, arrays = order
            if name == "close":
                return
            self._orders[name](arguments, arrays)

    def _forward(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        bucket, has_adapters = arguments
        self._computed = self._runner.forward(Bucket(*bucket), *arrays, has_adapters=has_adapters)

    def _sample(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        assert self._computed is not None
        self._dispatched.append(self._runner.sample(self._computed, *arguments, *arrays))

    def _read(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        self._runner.read(self._dispatched.popleft())

    def _read_files(self, number: int, kept: Sequence[int], path: str, digest: str | None) -> None:
        """Reads beside the steps, then tells the leader, which waits for it, how that went."""
        # What it does not want any more goes first: the memory is planned for one of a kind on its way. Where another
        # process could not read one, that may be on its way here still.
        self._wanted = frozenset((*kept, number))
        for unwanted in frozenset(tuple(self._kept)) - self._wanted:  # a tuple at once: readers add to it
            self._kept.pop(unwanted, None)

        def read() -> None:
            error, is_refusal = None, False
            try:
                part = self._read_params(path) if digest is None else self._read_adapter(path, digest)
                self._kept[number] = part
                if number not in self._wanted:
                    self._kept.pop(number, None)
            except Exception as cause:  # whatever it is, this process goes on with what it has
                is_refusal = isinstance(cause, (ValueError, OSError))
                error = str(cause) if is_refusal else f"{type(cause).__name__}: {cause}"
            with suppress(ClusterError):  # who listens to the leader knows that it has gone
                leader.send("read", {"number": number, "error": error, "is_refusal": is_refusal})

        (leader,) = self._cluster.peers
        threading.Thread(target=read, name="jaxserve-read", daemon=True).start()

    def _write_adapter(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        number, slot = arguments
        self._runner.write_adapter(self._kept.pop(number), slot)


def _ignore(handle: object) -> None:
    """The leader reads it."""
