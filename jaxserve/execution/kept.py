"""Compiled programs in a folder, for the next start: found by what they were made of, without being traced.

JAX's own compilation cache needs the lowered program to look it up. Lowering is Python, one step after another, and
takes longer than reading what was compiled.
"""

import hashlib
import json
import logging
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import pallas_kernels
from jaxserve.parallel import memory

logger = logging.getLogger(__name__)

_FOLDER = "programs"  # inside the folder of JAX's own cache
# Beginnings of the environment's variables that change what is compiled.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MOSAIC_", "NVIDIA_TF32")
_ELSEWHERE = {"JAX_COMPILATION_CACHE_DIR", "JAX_LOG_COMPILES", "JAX_LOGGING_LEVEL", *memory.VARIABLES}
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_use_shardy_partitioner")


def version_folder(folder: Path) -> Path:
    """Where in ``folder`` this version of the source keeps what is compiled, JAX's own cache included: it would give
    programs of another version, which then could not be kept."""
    return folder / _source_digest()[:16]


class _Compilations(threading.local):
    """What XLA compiled in this thread: neither what JAX's cache gave, nor what this process had made before and JAX
    gave again."""

    count = 0

    def on_event(self, event: str, **kwargs: str | int) -> None:
        self.count -= event == "/jax/compilation_cache/cache_hits"

    def on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"  # a hit of the cache has it too


@cache
def _compilations() -> _Compilations:
    made = _Compilations()
    jax.monitoring.register_event_listener(made.on_event)
    jax.monitoring.register_event_duration_secs_listener(made.on_duration)
    return made


class KeptPrograms:
    """The compiled programs of one mesh in ``folder``; whoever can write there can run code here.

    A program is found again if its name, ``facts``, the source of this package, the versions of JAX and of the device's
    runtime, the devices, the settings and the environment are what they were.
    """

    def __init__(self, folder: Path, mesh: Mesh, facts: Any):
        """``facts``: a tree of whatever the programs depend on, arrays by shape, dtype and placement alone."""
        self.folder = folder / _FOLDER
        self._devices = list(mesh.devices.flat)
        self._digest = hashlib.sha256(f"{_surroundings(mesh)} {_facts(facts)}".encode()).hexdigest()

    def path(self, name: str) -> Path:
        """Of the program of this name, whether it is there or not."""
        return self.folder / hashlib.sha256(f"{self._digest} {name}".encode()).hexdigest()

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The program of this name; None where there is none, or none that can be read."""
        path = self.path(name)
        try:
            program, arguments, results = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(
                program,
                jax.tree.structure(arguments),
                jax.tree.structure(results),
                self._devices[0].client,
                self._devices,
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a file that was cut short or damaged makes of it
            logger.warning("%s cannot be used and is made again: %s: %s", path, type(error).__name__, error)
            return None

    def compiled(self, name: str, compile: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
        """What ``compile`` makes in this thread, kept under this name if XLA made it now. What it once made may have
        come from JAX's cache, and XLA for CPUs writes programs that it has read without their functions. One that
        cannot be written is warned of."""
        made = _compilations()
        before = made.count
        program = compile()
        if made.count > before:
            self._keep(self.path(name), program)
        return program

    def load_numbers(self, name: str) -> dict[str, int]:
        """What ``keep_numbers`` kept under this name; empty where there is nothing that can be read."""
        path = self.path(name)
        try:
            found = json.loads(path.read_bytes())
            return {str(key): int(value) for key, value in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("%s cannot be used and is made again: %s: %s", path, type(error).__name__, error)
            return {}

    def keep_numbers(self, name: str, numbers: dict[str, int]) -> None:
        """Numbers that follow from what the programs do, under this name. Those that cannot be written are warned
        of."""
        try:
            self._write(self.path(name), json.dumps(numbers).encode())
        except OSError as error:
            logger.warning("%s is not kept for the next start: %s: %s", name, type(error).__name__, error)

    def _keep(self, path: Path, program: jax.stages.Compiled) -> None:
        try:
            made, arguments, results = serialize_executable.serialize(program)
            # Structures themselves cannot be pickled, trees of our own classes can.
            trees = [jax.tree.unflatten(tree, range(tree.num_leaves)) for tree in (arguments, results)]
            self._write(path, pickle.dumps((made, *trees)))
        except (OSError, ValueError, NotImplementedError) as error:
            logger.warning("%s is not kept for the next start: %s: %s", path, type(error).__name__, error)

    def _write(self, path: Path, data: bytes) -> None:
        """The whole of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            try:
                file.write(data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _facts(tree: Any) -> str:
    def of(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf.shape, str(leaf.dtype), str(getattr(leaf, "format", leaf.sharding))
        return leaf

    leaves, structure = jax.tree.flatten(tree)
    return repr((structure, [of(leaf) for leaf in leaves]))


def _surroundings(mesh: Mesh) -> str:
    devices = list(mesh.devices.flat)
    return repr(
        (
            jax.__version__,
            version("jaxlib"),
            devices[0].client.platform_version,
            [(d.id, d.device_kind) for d in devices],
            mesh.shape,
            [(name, getattr(jax.config, name)) for name in _SETTINGS],
            sorted(
                (k, v) for k, v in os.environ.items() if k.startswith(_VARIABLES) and k != "JAX_COMPILATION_CACHE_DIR"
            ),
            _cpu_features() if devices[0].platform == "cpu" else None,
            _source_digest(),
        )
    )


def _cpu_features() -> str:
    """What programs for this machine's processor may use of it, where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def _source_digest() -> str:
    """Of all that traces: this package's and the kernels' source files."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(pallas_kernels.__path__[0])):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
