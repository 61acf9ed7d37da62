"""``mesh.yaml``: one file that says which devices of which processes serve a model, and how they are divided."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxserve.config import ParallelConfig
from jaxserve.multihost.cluster import Timeouts

PLATFORMS = ("cpu", "cuda", "tpu")
AXES = ("stage", "tensor", "replica")
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class MeshFile:
    """What the file says.

    Attributes:
        hosts: names of the processes' hosts, in their order; () where only their number is given.
        coordinator: "host:port" where process 0 listens; None: the launcher says it, or the command line.
    """

    parallel: ParallelConfig
    num_processes: int
    devices_per_process: int
    platform: str | None = None
    hosts: tuple[str, ...] = ()
    coordinator: str | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)


def is_mesh_file(mesh: str | None) -> bool:
    """Whether a ``--mesh`` is a file's path, and not a mesh itself."""
    return mesh is not None and mesh.endswith(SUFFIXES)


def read_mesh_file(path: str | Path) -> MeshFile:
    """Raises ValueError naming the file and the key, with both numbers where two do not fit."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return _mesh_file(_mapping("the file", values, required=("axes",)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _mesh_file(values: dict[str, Any]) -> MeshFile:
    known = ("platform", "axes", "processes", "devices_per_process", "coordinator", "timeouts")
    _refuse_unknown("", values, known)
    axes = _mapping("axes", values["axes"])
    _refuse_unknown("axes.", axes, AXES)
    sizes = {axis: _positive(f"axes.{axis}", axes.get(axis, 1)) for axis in AXES}
    parallel = ParallelConfig(**sizes)
    processes = values.get("processes", 1)
    hosts = ()
    if isinstance(processes, list):
        hosts = tuple(str(host) for host in processes)
        if len(set(hosts)) != len(hosts):
            raise ValueError(f"processes: {', '.join(hosts)}: a host is there twice")
    count = _positive("processes", len(hosts) if isinstance(processes, list) else processes)
    if parallel.replica > 1 and count > 1:
        raise ValueError(f"axes.replica={parallel.replica} must be 1 with processes={count}: replicas share one")
    needed = parallel.num_devices
    per_process = _positive("devices_per_process", values.get("devices_per_process", -(-needed // count)))
    if needed != count * per_process:
        raise ValueError(
            f"axes {parallel} take {needed} devices, processes={count} with devices_per_process={per_process} have "
            f"{count * per_process}"
        )
    platform = values.get("platform")
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is not one of {', '.join(PLATFORMS)}")
    coordinator = values.get("coordinator")
    if coordinator is not None and not isinstance(coordinator, str):
        raise ValueError(f"coordinator={coordinator!r} is not text")
    timeouts = _mapping("timeouts", values.get("timeouts", {}))
    _refuse_unknown("timeouts.", timeouts, ("start_s", "heartbeat_s"))
    for name, value in timeouts.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"timeouts.{name}={value!r} is not a number")
    return MeshFile(
        parallel=parallel,
        num_processes=count,
        devices_per_process=per_process,
        platform=platform,
        hosts=hosts,
        coordinator=coordinator,
        timeouts=Timeouts(**timeouts),
    )


def _mapping(name: str, value: Any, required: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r:.80} is not a mapping of keys to values")
    for key in required:
        if key not in value:
            raise ValueError(f"{key} is missing")
    return value


def _refuse_unknown(prefix: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key} is not one of {', '.join(known)}")


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive number")
    return value
