"""From one process to an engine on the devices of several: they find each other first, then JAX joins them."""

from collections.abc import Callable

import jax

from jaxserve.engine.engine import Engine
from jaxserve.engine.mirror import Follower
from jaxserve.execution.adapters import StageAdapters
from jaxserve.multihost.cluster import Cluster, Timeouts, join
from jaxserve.multihost.process import Process


def joined(process: Process, facts: dict[str, object], token: bytes, timeouts: Timeouts | None = None) -> Cluster:
    """Waits for all processes and joins their devices. Before JAX has looked for devices; once in a process.

    Args:
        facts: see ``multihost.cluster.join``.

    Raises:
        ClusterError, Refused: as ``multihost.cluster.join``.
    """
    timeouts = timeouts or Timeouts()
    cluster = join(process, facts | {"jax": jax.__version__}, token, timeouts)
    # On CPUs programs are then run in the order of their dispatch, as gloo's collectives must be in every process.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, by which servers drain
    host, port = process.address()
    jax.distributed.initialize(
        coordinator_address=f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}",
        num_processes=process.count,
        process_id=process.index,
        initialization_timeout=max(1, int(timeouts.start_s)),
    )
    return cluster


def follow(engine: Engine, cluster: Cluster) -> None:
    """Does with ``engine`` what the leader does with its own, until it is closed there.

    Raises ClusterError where the leader sends what does not follow.
    """
    Follower(engine.loop.runner, cluster, engine.load_params, _lora_reader(engine)).run()


def _lora_reader(engine: Engine) -> Callable[[str, str], StageAdapters]:
    def read(path: str, digest: str) -> StageAdapters:
        (arrays,) = engine.read_lora(path, digest).arrays  # replicas share one process: there are none
        return arrays

    return read


def leave_cluster(cluster: Cluster) -> None:
    """The end of a process that has nothing to do any more; all of them call it, or are gone."""
    cluster.close()
    jax.distributed.shutdown()
