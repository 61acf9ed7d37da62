"""The device mesh: two axes, ``("stage", "tensor")``, always both present; of replicas one mesh each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ModelConfig, ParallelConfig

AXES = ("stage", "tensor")
NAMES = ("replica", *AXES)  # replicas are meshes of their own: nothing is computed across them


def parse_mesh(text: str) -> ParallelConfig:
    """``"stage=2,tensor=4"`` to a ``ParallelConfig``; an axis left out is 1."""
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        if name not in NAMES or name in sizes:
            raise ValueError(
                f"mesh: {part!r}: expected each of {', '.join(NAMES)} once at most, as in stage=2,tensor=4"
            )
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"mesh: {part!r}: {value!r} is not a positive integer")
        sizes[name] = int(value)
    return ParallelConfig(**sizes)


def check_mesh(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError, with both numbers and what would fit, where the model does not divide over the mesh."""
    misfit = _misfit(config, parallel)
    if misfit is not None:
        num_devices = parallel.stage * parallel.tensor
        fitting = [str(mesh) for mesh in fitting_meshes(config, num_devices)]
        each = "" if parallel.replica == 1 else " a replica"
        raise ValueError(f"{misfit}; of {num_devices} devices{each} {' or '.join(fitting) or 'no mesh'} would fit")


def fitting_meshes(config: ModelConfig, num_devices: int) -> list[ParallelConfig]:
    """All meshes of so many devices over which the model divides, the most ``tensor`` first."""
    meshes = [
        ParallelConfig(stage=n, tensor=num_devices // n) for n in range(1, num_devices + 1) if not num_devices % n
    ]
    return [mesh for mesh in meshes if _misfit(config, mesh) is None]


def _misfit(config: ModelConfig, parallel: ParallelConfig) -> str | None:
    """What does not divide over the mesh, with both numbers.

    Kv heads fewer than ``tensor`` are given to several devices each, which share out their query heads.
    """
    if parallel.stage > config.num_layers:
        return f"num_layers={config.num_layers} is fewer than stage={parallel.stage}"
    sizes: list[tuple[str, int, str, int]] = []
    if config.mla is not None or parallel.tensor % config.num_kv_heads == 0:
        sizes.append(("num_heads", config.num_heads, "tensor", parallel.tensor))
    else:
        sizes.append(("num_kv_heads", config.num_kv_heads, "tensor", parallel.tensor))
    if any(not config.is_moe(i) for i in range(config.num_layers)):
        sizes.append(("intermediate_size", config.intermediate_size, "tensor", parallel.tensor))
    if config.moe is not None:
        moe = config.moe
        sizes.append(("moe.intermediate_size", moe.intermediate_size, "tensor", parallel.tensor))
        sizes.append(("moe.shared_intermediate_size", moe.shared_intermediate_size, "tensor", parallel.tensor))
    for name, size, axis, ways in sizes:
        if size % ways:
            return f"{name}={size} is not divisible by {axis}={ways}"
    return None


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first ``stage * tensor`` devices, tensor neighbours adjacent.

    Raises:
        ValueError: there are fewer, or replicas are asked for, which are several meshes.
    """
    if parallel.replica != 1:
        raise ValueError(f"mesh replica={parallel.replica}: one mesh is of replica=1")
    (mesh,) = make_meshes(parallel, devices)
    return mesh


def make_meshes(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> tuple[Mesh, ...]:
    """A mesh for each replica, the devices of each adjacent, over the first of ``devices``."""
    devices = jax.devices() if devices is None else devices
    need = parallel.num_devices
    if len(devices) < need:
        raise ValueError(f"mesh {parallel} needs {need} devices, there are {len(devices)}")
    each = np.array(devices[:need]).reshape(parallel.replica, parallel.stage, parallel.tensor)
    return tuple(Mesh(own, AXES) for own in each)


def split_mesh(mesh: Mesh) -> tuple[Mesh, ...]:
    """The replicas' meshes of one that was made elsewhere, with axes ("stage", "tensor") or those after "replica"."""
    if mesh.axis_names == AXES:
        return (mesh,)
    if mesh.axis_names == NAMES:
        return tuple(Mesh(own, AXES) for own in mesh.devices)
    raise ValueError(f"mesh axes are {mesh.axis_names}, expected {AXES} or {NAMES}")


def parallel_config(mesh: Mesh, replica: int = 1) -> ParallelConfig:
    """The axis sizes of one replica's mesh, of so many replicas."""
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh axes are {mesh.axis_names}, expected {AXES}")
    return ParallelConfig(stage=mesh.shape["stage"], tensor=mesh.shape["tensor"], replica=replica)
