"""Imports go one way: kernels, configs -> host wing | device wing -> runner -> engine -> server -> cli."""

from tests.architecture.imports import imports_of, modules

ROOMS = {
    "pallas_kernels": "kernels",
    "jaxserve.config": "configs",
    "jaxserve.errors": "configs",
    "jaxserve.sampling_params": "configs",
    "jaxserve.request": "configs",
    "jaxserve.step_io": "configs",
    "jaxserve.constraint_io": "configs",
    "jaxserve.text": "host wing",
    "jaxserve.cache.pool": "host wing",
    "jaxserve.scheduler": "host wing",
    "jaxserve.multihost": "host wing",
    "jaxserve.cache.pages": "device wing",
    "jaxserve.parallel": "device wing",
    "jaxserve.model": "device wing",
    "jaxserve.execution": "device wing",
    "jaxserve.execution.runner": "runner",
    "jaxserve.checkpoint": "checkpoint",
    "jaxserve.quantization": "quantization",
    "jaxserve.engine": "engine",
    "jaxserve.bench": "bench",
    "jaxserve.server": "server",
    "jaxserve.loadtest": "load test",
    "jaxserve.cli": "cli",
    "jaxserve.__main__": "cli",
    "jaxserve.cache": "names",  # these two only gather or defer names
    "jaxserve": "names",
}  # module or package -> room; the longest match holds

MAY_IMPORT = {
    "kernels": set(),
    "configs": set(),
    "host wing": {"configs"},
    "device wing": {"kernels", "configs"},
    "runner": {"kernels", "configs", "device wing"},
    "checkpoint": {"configs", "host wing", "device wing"},
    "quantization": {"configs", "host wing", "device wing", "checkpoint"},
    "engine": {"kernels", "configs", "host wing", "device wing", "runner", "checkpoint"},
    "bench": {"names", "kernels", "configs", "host wing", "device wing", "runner", "checkpoint", "engine"},
    "server": {"names", "configs", "host wing", "engine"},
    "load test": {"names", "configs", "engine", "bench", "server"},
    "cli": {
        "names",
        "configs",
        "host wing",
        "device wing",
        "checkpoint",
        "quantization",
        "engine",
        "bench",
        "server",
        "load test",
    },
}  # besides itself


def room_of(name: str) -> str:
    while name not in ROOMS:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{name} is in no room: add it to the table, and to the design"
    return ROOMS[name]


def test_imports_go_one_way():
    known = modules()
    wrong = []
    for name in known:
        room = room_of(name)
        if room == "names":
            continue
        for target in imports_of(name, known):
            if target.split(".")[0] not in ("jaxserve", "pallas_kernels"):
                continue
            if room_of(target) not in MAY_IMPORT[room] | {room}:
                wrong.append(f"{name} ({room}) imports {target} ({room_of(target)})")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_modules():
    rooms = {room_of(name) for name in modules()}
    assert rooms == set(ROOMS.values())


def test_directions_have_no_cycle():
    done: set[str] = set()
    while waiting := {room: need - done for room, need in MAY_IMPORT.items() if room not in done}:
        free = {room for room, need in waiting.items() if need <= {"names"}}
        assert free, f"cycle among {sorted(waiting)}"
        done |= free


def test_host_wing_never_names_jax():
    known = modules()
    for name in known:
        if room_of(name) in ("configs", "host wing"):
            tops = {target.split(".")[0] for target in imports_of(name, known)}
            assert not tops & {"jax", "jaxlib", "flax"}, name
