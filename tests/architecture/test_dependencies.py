"""What is imported is declared, what is declared is imported, and the core makes do with what a GPU machine has."""

import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.imports import PACKAGES, ROOT, imports_of, modules
from tests.architecture.test_import_direction import room_of

IMPORT_NAMES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "huggingface-hub": "huggingface_hub",
    "opentelemetry-exporter-otlp-proto-grpc": "opentelemetry",
    "opentelemetry-sdk": "opentelemetry",
    "prometheus-client": "prometheus_client",
    "protobuf": "google",
    "pyyaml": "yaml",
}  # distribution -> top-level module, where they differ

GPU_MACHINE = [
    "jax",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "grpcio",
    "protobuf",
    "prometheus-client",
    "rich",
    "typer",
]

HOST_ROOMS = ("configs", "host wing")
CORE_ROOMS = (*HOST_ROOMS, "kernels", "device wing", "runner", "checkpoint", "engine", "bench", "cli", "names")


def modules_of(rooms: Iterable[str]) -> list[str]:
    return [name for name in modules() if room_of(name) in rooms and name != "jaxserve.__main__"]


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def with_requirements(names: Iterable[str]) -> set[str]:
    """The distributions named and, of what is installed, all that they require."""
    waiting, seen = [Requirement(name) for name in names], set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            texts = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, texts):
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name for name, _ in seen}


def test_imports_and_declared_dependencies_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["otel"]
    names = [canonicalize_name(Requirement(text).name) for text in texts]
    declared = {IMPORT_NAMES.get(name, name) for name in names}
    known = modules()
    imported = {target.split(".")[0] for name in known for target in imports_of(name, known)}
    assert imported - set(sys.stdlib_module_names) - set(PACKAGES) == declared


def test_what_an_extra_installs_is_imported_by_one_module():
    """And that one by the server alone, when spans are asked for (tests/server/test_tracing.py)."""
    known = modules()
    tracing = "jaxserve.server.tracing"
    imported = {name: set(imports_of(name, known)) for name in known}
    assert [name for name in known if any(t.startswith("opentelemetry.") for t in imported[name])] == [tracing]
    assert [name for name in known if tracing in imported[name]] == ["jaxserve.server.app"]


def test_constraints_pin_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and pin.url is None for pin in pins)
    pinned = {canonicalize_name(pin.name) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert not with_requirements(wanted) - pinned


def test_host_wing_runs_without_jax():
    run_python(
        f"import importlib, sys\n"
        f"for name in {modules_of(HOST_ROOMS)}: importlib.import_module(name)\n"
        f"assert not {{'jax', 'jaxlib', 'flax'}} & set(sys.modules)"
    )


def test_core_imports_on_a_gpu_machine():
    """Everything that is not on such a machine is hidden: what the list of packages there does not bring with it."""
    allowed = with_requirements(GPU_MACHINE)
    homes = importlib.metadata.packages_distributions()
    hidden = {top for top, homes_of in homes.items() if not {canonicalize_name(h) for h in homes_of} & allowed}
    hidden -= set(PACKAGES)
    assert {"gguf", "grpc_health", "grpc_reflection", "pytest"} <= hidden
    run_python(
        f"import importlib, sys\n"
        f"class Hide:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {hidden!r}:\n"
        f"            raise ModuleNotFoundError(f'{{name}} is not on a GPU machine', name=name)\n"
        f"sys.meta_path.insert(0, Hide())\n"
        f"for name in {modules_of(CORE_ROOMS)}: importlib.import_module(name)"
    )
