"""The ``launch`` command: one process of several that serve a model together."""

import os
import signal
import socket
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.loading import select_platform
from jaxserve.cli.options import EngineOptions, Model, flatten_options
from jaxserve.cli.serving import ServingOptions, run_server
from jaxserve.cli.terminal import ProgressDisplay, note
from jaxserve.multihost.process import Process, this_process
from jaxserve.server.logs import set_up

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.multihost.cluster import Cluster, Timeouts
    from jaxserve.multihost.mesh_file import MeshFile
    from jaxserve.server.app import Server

OWN_TO_A_HOST = ("compilation_cache_dir", "mesh", "num_pages", "memory_fraction")  # mesh is a fact of its own


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Which process this is. Unset is taken from the mesh file, or from the launcher's variables."""

    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 listens; JAX takes the next port, too.")
    ] = None
    num_processes: Annotated[int | None, typer.Option(help="Processes in all.")] = None
    process_id: Annotated[int | None, typer.Option(help="This one, from 0; 0 has the server.")] = None
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the secret that all processes share. (default: none)")
    ] = None
    start_timeout: Annotated[float | None, typer.Option(help="Seconds until all are there. (default: 300)")] = None
    heartbeat_timeout: Annotated[
        float | None, typer.Option(help="Seconds of silence after which a process is taken for dead. (default: 6)")
    ] = None


@flatten_options
def launch(model: Model, engine: EngineOptions, hosts: HostOptions, serving: ServingOptions) -> None:
    """Serve a model on the devices of several hosts: the same command on each, by hand or by srun, mpirun, Kubernetes.

    --mesh is a mesh file, or as for serve. Process 0 serves, the others compute with it until it ends.
    """
    from jaxserve.multihost.mesh_file import is_mesh_file, read_mesh_file

    file = read_mesh_file(str(engine.mesh)) if is_mesh_file(engine.mesh) else None
    if file is not None:
        engine = replace(engine, mesh=str(file.parallel), platform=engine.platform or file.platform)
    process, timeouts = _process(hosts, file), _timeouts(hosts, file)
    token = b"" if hosts.token_file is None else _token(hosts.token_file)
    facts = _facts(model, engine, process)
    if process.leads:
        _lead(model, engine, serving, process, facts, token, timeouts)
    else:
        set_up(serving.log_format)
        _follow(model, engine, process, facts, token, timeouts)


def _process(hosts: HostOptions, file: "MeshFile | None") -> Process:
    index, count, coordinator = hosts.process_id, hosts.num_processes, hosts.coordinator
    if file is not None:
        if count is not None and count != file.num_processes:
            raise ValueError(f"num_processes={count}, the mesh file has processes={file.num_processes}")
        count = file.num_processes
        coordinator = coordinator or file.coordinator
        if index is None and socket.gethostname() in file.hosts:
            index = file.hosts.index(socket.gethostname())
    return this_process(os.environ, index=index, count=count, coordinator=coordinator)


def _timeouts(hosts: HostOptions, file: "MeshFile | None") -> "Timeouts":
    from jaxserve.multihost.cluster import Timeouts

    timeouts = Timeouts() if file is None else file.timeouts
    if hosts.start_timeout is not None:
        timeouts = replace(timeouts, start_s=hosts.start_timeout)
    if hosts.heartbeat_timeout is not None:
        timeouts = replace(timeouts, heartbeat_s=hosts.heartbeat_timeout)
    return timeouts


def _token(path: Path) -> bytes:
    token = path.read_bytes().strip()
    if len(token) < 16:
        raise ValueError(f"token_file {path}: {len(token)} bytes, a secret has at least 16")
    return token


def _facts(model: str, engine: EngineOptions, process: Process) -> dict[str, object]:
    """What must be the same everywhere. Checks the mesh against the model, too, before anything is allocated."""
    import jaxserve
    from jaxserve.engine.loading import model_digest, opened_model
    from jaxserve.parallel.mesh import check_mesh, parse_mesh

    options, parallel = engine.keywords(), parse_mesh(engine.mesh or "")
    if parallel.replica > 1 and process.count > 1:
        raise ValueError(f"mesh {parallel}: replica must be 1 with num_processes={process.count}: replicas share one")
    with ProgressDisplay() as progress:
        digest = model_digest(model, on_progress=progress)
    with opened_model(model, skip_tokenizer_init=True) as found:
        check_mesh(found.config, parallel)
    own = {name: value for name, value in sorted(options.items()) if name not in OWN_TO_A_HOST}
    given = {"num_pages": options.get("num_pages"), "memory_fraction": options.get("memory_fraction")}
    facts: dict[str, object] = {"jaxserve": jaxserve.__version__, "model": digest, "mesh": engine.mesh or "one device"}
    return facts | own | {name: value for name, value in given.items() if value is not None}


def _open(model: str, engine: EngineOptions, cluster: "Cluster") -> "Engine":
    from jaxserve.engine.engine import Engine

    keywords: dict[str, Any] = engine.keywords()
    with ProgressDisplay() as progress:
        return Engine.from_pretrained(model, on_progress=progress, cluster=cluster, **keywords)


def _lead(
    model: str,
    engine: EngineOptions,
    serving: ServingOptions,
    process: Process,
    facts: dict[str, object],
    token: bytes,
    timeouts: "Timeouts",
) -> None:
    started: Future[Server] = Future()
    clusters: list[Cluster] = []

    def open_it() -> "Engine":
        select_platform(engine.platform, engine.memory_fraction)
        from jaxserve.engine.joining import joined

        note(f"process 0 waits for {process.count - 1} more at {process.coordinator}")
        clusters.append(joined(process, facts, token, timeouts))
        clusters[0].when_lost(started.result().engine.fail)
        return _open(model, engine, clusters[0])

    run_server(model, engine, serving, open_it, on_start=started.set_result)
    from jaxserve.engine.joining import leave_cluster

    for cluster in clusters:
        leave_cluster(cluster)


def _follow(
    model: str,
    engine: EngineOptions,
    process: Process,
    facts: dict[str, object],
    token: bytes,
    timeouts: "Timeouts",
) -> None:
    # A launcher tells all processes to end at once: this one goes on until the leader has finished.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    select_platform(engine.platform, engine.memory_fraction)
    from jaxserve.engine.joining import follow, joined, leave_cluster

    note(f"process {process.index} joins process 0 at {process.coordinator}")
    cluster = joined(process, facts, token, timeouts)
    with _open(model, engine, cluster) as ready:
        note(f"process {process.index} follows")
        follow(ready, cluster)
    leave_cluster(cluster)
    note("stopped")
