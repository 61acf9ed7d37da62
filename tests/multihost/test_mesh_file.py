"""Mesh files and launchers' variables: what they say, and what is refused, with both numbers."""

import re
from pathlib import Path

import pytest

from jaxserve.config import ParallelConfig
from jaxserve.multihost.mesh_file import read_mesh_file
from jaxserve.multihost.process import Process, this_process
from jaxserve.parallel.mesh import check_mesh
from tests import tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "multi_host"


def read(tmp_path: Path, text: str):
    file = tmp_path / "mesh.yaml"
    file.write_text(text)
    return read_mesh_file(file)


@pytest.mark.parametrize(
    ("name", "processes", "devices"),
    [
        ("gpu_1x8", 1, 8),
        ("gpu_replicas", 1, 8),
        ("gpu_2x4", 2, 4),
        ("tpu_v5e_8", 1, 8),
        ("tpu_two_hosts", 2, 4),
        ("cpu_2x2", 2, 2),
    ],
)
def test_examples(name: str, processes: int, devices: int):
    file = read_mesh_file(EXAMPLES / f"{name}.yaml")
    assert (file.num_processes, file.devices_per_process) == (processes, devices)
    assert file.parallel.num_devices == processes * devices
    assert file.platform == {"gpu": "cuda"}.get(name[:3], name[:3])


def test_all_keys(tmp_path: Path):
    file = read(
        tmp_path,
        "platform: cpu\naxes: {stage: 2, tensor: 3}\nprocesses: [a, b]\ndevices_per_process: 3\n"
        "coordinator: a:1234\ntimeouts: {start_s: 9, heartbeat_s: 2.5}\n",
    )
    assert (file.parallel, file.hosts, file.num_processes) == (ParallelConfig(stage=2, tensor=3), ("a", "b"), 2)
    assert (file.platform, file.coordinator, file.timeouts.start_s, file.timeouts.heartbeat_s) == (
        "cpu",
        "a:1234",
        9,
        2.5,
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "the file: [] is not a mapping"),
        ("axes: {tensor: 2", "expected ',' or '}'"),
        ("processes: 2", "axes is missing"),
        ("axes: {tensor: 2}\nnodes: 2", "nodes is not one of platform, axes,"),
        ("axes: {model: 2}", "axes.model is not one of stage, tensor, replica"),
        ("axes: {tensor: 0}", "axes.tensor=0 is not a positive number"),
        ("axes: {tensor: true}", "axes.tensor=True is not a positive number"),
        (
            "axes: {tensor: 2, replica: 2}\nprocesses: 4",
            "axes.replica=2 must be 1 with processes=4: replicas share one",
        ),
        (
            "axes: {tensor: 2, replica: 3}\ndevices_per_process: 4",
            "axes replica=3,stage=1,tensor=2 take 6 devices, processes=1 with devices_per_process=4 have 4",
        ),
        (
            "axes: {tensor: 4, stage: 2}\nprocesses: 2\ndevices_per_process: 2",
            "axes stage=2,tensor=4 take 8 devices, processes=2 with devices_per_process=2 have 4",
        ),
        ("axes: {tensor: 2}\nprocesses: [a, a]", "processes: a, a: a host is there twice"),
        ("axes: {tensor: 2}\nplatform: gpu", "platform='gpu' is not one of cpu, cuda, tpu"),
        ("axes: {tensor: 2}\ntimeouts: {start_s: soon}", "timeouts.start_s='soon' is not a number"),
        ("axes: {tensor: 2}\ntimeouts: {heartbeat_s: 0.1}", "heartbeat_s=0.1 must be at least 0.5"),
        ("axes: {tensor: 2}\ncoordinator: 7", "coordinator=7 is not text"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, reason: str):
    with pytest.raises(ValueError, match=rf"mesh.yaml: .*{re.escape(reason)}"):
        read(tmp_path, text)
    with pytest.raises(ValueError, match=r"none.yaml: .*No such file"):
        read_mesh_file(tmp_path / "none.yaml")


def test_what_would_fit_is_told():
    with pytest.raises(ValueError, match=r"num_layers=4 is fewer than stage=5; of 5 devices no mesh would fit"):
        check_mesh(tiny.CONFIG, ParallelConfig(stage=5))
    told = "stage=8; of 8 devices stage=1,tensor=8 or stage=2,tensor=4 or stage=4,tensor=2 would fit"
    with pytest.raises(ValueError, match=f"num_layers=4 is fewer than {told}"):
        check_mesh(tiny.CONFIG, ParallelConfig(stage=8))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"},
            Process(3, 4, "10.0.0.9:50070"),
        ),
        (
            {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "x-0.x.default"},
            Process(1, 2, "x-0.x.default:50070"),
        ),
        (
            {
                "JOB_COMPLETION_INDEX": "1",
                "JAXSERVE_NUM_PROCESSES": "2",
                "JAXSERVE_COORDINATOR_HOST": "j-0-0.j",
            },
            Process(1, 2, "j-0-0.j:50070"),
        ),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t0,t1,t2"}, Process(1, 3, "t0:50070")),
    ],
)
def test_launchers_variables(environment: dict[str, str], expected: Process):
    assert this_process(environment) == expected
    assert this_process(environment, coordinator="z:1") == Process(expected.index, expected.count, "z:1")


def test_what_nobody_says_is_named():
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert this_process(mpi, coordinator="a:5") == Process(1, 2, "a:5")
    for environment, given, reason in [
        (mpi, {}, "--coordinator is missing, and Open MPI does not say it"),
        ({}, {}, "--process-id is missing, and no launcher's variables are set"),
        ({}, {"index": 0}, "--num-processes is missing"),
        (mpi | {"OMPI_COMM_WORLD_RANK": "x"}, {"coordinator": "a:5"}, "OMPI_COMM_WORLD_RANK='x' is not a number"),
        (mpi, {"coordinator": "a:5", "index": 2}, "process_id=2 is not one of 0 to 1: num_processes=2"),
        (mpi, {"coordinator": "a"}, "coordinator='a' is not a host and a port"),
        (mpi, {"coordinator": "a:65535"}, "coordinator='a:65535' is not a host and a port below 65535"),
    ]:
        with pytest.raises(ValueError, match=reason):
            this_process(environment, **given)
