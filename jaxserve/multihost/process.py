"""Which process of how many this one is: as it was told, or as the cluster's launcher says in the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_PORT = 50070  # of the coordinator; JAX's own service takes the next one


@dataclass(frozen=True)
class Process:
    """One of the processes that serve a model together. Number 0 leads: it has the scheduler and the servers.

    Attributes:
        coordinator: "host:port" where process 0 listens; JAX's service there takes the next port.
    """

    index: int
    count: int
    coordinator: str

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"num_processes={self.count} must be at least 1")
        if not 0 <= self.index < self.count:
            raise ValueError(f"process_id={self.index} is not one of 0 to {self.count - 1}: num_processes={self.count}")
        self.address()

    @property
    def leads(self) -> bool:
        return self.index == 0

    def address(self) -> tuple[str, int]:
        """Where process 0 listens."""
        host, colon, port = self.coordinator.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise ValueError(
                f'coordinator={self.coordinator!r} is not a host and a port below 65535 as "10.0.0.1:50070"'
            )
        return host.strip("[]"), int(port)


class Launcher(NamedTuple):
    """The variables in which a launcher tells its processes about themselves.

    Attributes:
        host: has the host of process 0, alone or as the first of a list; "" where the launcher does not say it.
    """

    name: str
    index: str
    count: str
    host: str


LAUNCHERS = (
    Launcher("LeaderWorkerSet", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS"),
    # A JobSet sets the first by itself; its manifest sets the others (examples/multi_host/jobset.yaml).
    Launcher("JobSet", "JOB_COMPLETION_INDEX", "JAXSERVE_NUM_PROCESSES", "JAXSERVE_COORDINATOR_HOST"),
    Launcher("TPU", "TPU_WORKER_ID", "TPU_WORKER_COUNT", "TPU_WORKER_HOSTNAMES"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
    Launcher("MPICH", "PMI_RANK", "PMI_SIZE", ""),
    Launcher("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LAUNCH_NODE_IPADDR"),
)  # the first whose variables are set holds


def this_process(
    environment: Mapping[str, str],
    *,
    index: int | None = None,
    count: int | None = None,
    coordinator: str | None = None,
) -> Process:
    """This process: what is given holds, the launcher's variables say the rest.

    Raises:
        ValueError: something is said nowhere, or is no number; names the option and the variables.
    """
    launcher = next((x for x in LAUNCHERS if x.index in environment and _count(x, environment) is not None), None)
    if launcher is not None:
        index = _number(environment, launcher.index) if index is None else index
        count = _count(launcher, environment) if count is None else count
        host = environment.get(launcher.host, "").split(",")[0].strip()
        if coordinator is None and host:
            coordinator = f"{host}:{DEFAULT_PORT}"
    for option, value in {"--process-id": index, "--num-processes": count, "--coordinator": coordinator}.items():
        if value is None:
            by = f"{launcher.name} does not say it" if launcher else "no launcher's variables are set"
            raise ValueError(f"{option} is missing, and {by}")
    assert index is not None and count is not None and coordinator is not None
    return Process(index, count, coordinator)


def _count(launcher: Launcher, environment: Mapping[str, str]) -> int | None:
    if launcher.count in environment:
        return _number(environment, launcher.count)
    hosts = environment.get(launcher.host, "") if launcher.name == "TPU" else ""  # which lists all of them
    return len(hosts.split(",")) if hosts else None


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name}={environment[name]!r} is not a number") from None
