"""One runner on every host of a mesh: what the leader's does, the followers' do, with the same inputs."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.execution.runner import Computed, Runner
from jaxserve.execution.step import StageParams
from jaxserve.multihost.cluster import Cluster, ClusterError
from jaxserve.step_io import Bucket, Sampling, StepOutputs


class LeadingRunner(Runner):
    """A runner whose steps run on other processes' devices, too: each is ordered there before it is dispatched here.

    Args:
        cluster: of the leader.
    """

    _cluster: Cluster | None = None  # while the constructor runs: all processes warm up by themselves
    _others_have_loaded = False

    def __init__(self, cluster: Cluster, *args: Any):
        super().__init__(*args)
        self._cluster = cluster

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
        self._order("forward", [*bucket], [buffers])
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
        """As ``Runner.update_params``, of weights that all hosts have read (``have_loaded``)."""
        if not self._others_have_loaded:
            raise ValueError("an engine of several hosts takes other weights by load_params only, which all hosts read")
        self._others_have_loaded = False
        self._order("update_params")
        super().update_params(params)

    def have_loaded(self, name_or_path: str | Path) -> None:
        """Has every follower read other weights, for the next ``update_params``. While they do, steps go on.

        Raises:
            ValueError: one of them cannot; says which, and why.
        """
        assert self._cluster is not None
        self._order("load_params", [str(name_or_path)])
        for peer, reply in zip(self._cluster.peers, self._cluster.replies("read"), strict=True):
            if reply.header["error"] is not None:
                raise ValueError(f"{peer.name}: {reply.header['error']}")
        self._others_have_loaded = True

    def close(self) -> None:
        with suppress(ClusterError):  # it has gone, as it was to
            self._order("close")
        super().close()


class Follower:
    """A follower's runner, and what the leader has it do.

    Args:
        load_params: reads other weights, as ``Engine.load_params``.
    """

    def __init__(self, runner: Runner, cluster: Cluster, load_params: Callable[[str], StageParams]):
        self._runner, self._cluster, self._load = runner, cluster, load_params
        self._computed: Computed | None = None
        self._dispatched: deque[jax.Array] = deque()
        self._loaded: StageParams | None = None
        self._orders: dict[str, Callable[[list[Any], list[np.ndarray]], None]] = {
            "forward": self._forward,
            "sample": self._sample,
            "read": self._read,
            "score": lambda arguments, _: _ignore(runner.score(*arguments)),
            "pool": lambda _, arrays: _ignore(runner.pool(*arrays)),
            "load_constraints": lambda _, arrays: runner.load_constraints(*arrays),
            "load_params": lambda arguments, _: self._load_params(*arguments),
            "update_params": self._update_params,
        }

    def run(self) -> None:
        """Does what the leader orders until it closes its runner, or ends."""
        while (order := self._cluster.next_order()) is not None:
            name, arguments, arrays = order
            if name == "close":
                return
            self._orders[name](arguments, arrays)

    def _forward(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        self._computed = self._runner.forward(Bucket(*arguments), *arrays)

    def _sample(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        assert self._computed is not None
        self._dispatched.append(self._runner.sample(self._computed, *arguments, *arrays))

    def _read(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        self._runner.read(self._dispatched.popleft())

    def _load_params(self, path: str) -> None:
        def load() -> None:
            error = None
            try:
                self._loaded = self._load(path)
            except (ValueError, OSError) as cause:
                error = str(cause)
            self._cluster.peers[0].send("read", {"error": error})

        threading.Thread(target=load, name="jaxserve-load", daemon=True).start()

    def _update_params(self, arguments: list[Any], arrays: list[np.ndarray]) -> None:
        assert self._loaded is not None  # the leader waited for it
        self._runner.update_params(self._loaded)
        self._loaded = None


def _ignore(handle: object) -> None:
    """The leader reads it."""
