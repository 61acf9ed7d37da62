"""Parameters onto the mesh, each device's part read for itself: no host copy of the whole model."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import ModelConfig
from jaxserve.execution.step import StageParams, stage_param_shapes, stage_param_specs
from jaxserve.model.params import ArraySpec, ParamSource, TreeSource, layer_fields, named_leaves
from jaxserve.parallel.placed import ReplicatedHeads, copies_of_kv_heads

READERS = 8  # threads at most; each holds one device's part of one parameter


def place_params(
    source: ParamSource,
    config: ModelConfig,
    placed: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    on_parameter: Callable[[int, int], None] | None = None,
) -> StageParams:
    """The parameters of ``source`` on the mesh in ``dtype``; V is padded to divide over tensor.

    Args:
        source: of ``config``'s parameters.
        placed: ``parallel.placed.placed_config`` of ``config``.
        on_parameter: called with (done, total) after each, from any thread.
    """
    num_stages, tensor = mesh.shape["stage"], mesh.shape["tensor"]
    copies = copies_of_kv_heads(config, tensor)
    heads = ReplicatedHeads(source, config, copies)
    shapes, specs = stage_param_shapes(placed, num_stages, tensor), stage_param_specs(placed, num_stages)
    is_plain = num_stages == 1 and copies == 1  # a live array may stay on its devices
    done = 0

    def place(name: str, spec: ArraySpec, sharding: NamedSharding) -> jax.Array:
        nonlocal done
        live = source.array(name) if is_plain and isinstance(source, TreeSource) else None
        if isinstance(live, jax.Array) and live.size == math.prod(spec.shape):
            array = jax.device_put(live.reshape(spec.shape).astype(dtype), sharding)
        else:

            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return _part(heads, placed, num_stages, name, spec.shape, index, dtype)

            array = jax.make_array_from_callback(spec.shape, sharding, read)
        done += 1
        if on_parameter is not None:
            on_parameter(done, len(jobs))
        return array

    jobs = [
        (name, spec, NamedSharding(mesh, p))
        for (name, spec), (_, p) in zip(named_leaves(shapes), named_leaves(specs), strict=True)
    ]
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        leaves = list(pool.map(lambda job: place(*job), jobs))
    return jax.tree.unflatten(jax.tree.structure(specs), leaves)


def is_layer(name: str) -> bool:
    """Whether a parameter of ``StageParams`` has a leading ST axis."""
    return name.startswith("layers.")


def _part(
    source: ReplicatedHeads,
    placed: ModelConfig,
    num_stages: int,
    name: str,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    dtype: jnp.dtype,
) -> np.ndarray:
    """Part ``index`` of a parameter of ``StageParams`` whose whole ``shape`` is given."""
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
    if not is_layer(name):
        if name not in ("embed", "head"):
            return _read(source, name, index, dtype)
        rows, columns = index  # V may be padded
        given = slice(min(rows.start, placed.vocab_size), min(rows.stop, placed.vocab_size))
        out = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
        if given.start < given.stop:
            out[: given.stop - given.start] = _read(source, name, (given, columns), dtype)
        return out
    _, position, field = name.split(".")
    per_stage = placed.num_layers // num_stages
    parts = []
    for stage in range(index[0].start, index[0].stop):
        layer = stage * per_stage + int(position)
        if field in layer_fields(placed, layer):
            parts.append(_read(source, f"layers.{layer}.{field}", index[1:], dtype))
        else:  # another stage's layer at this place is of another kind
            parts.append(np.zeros([s.stop - s.start for s in index[1:]], dtype))
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def _read(source: ReplicatedHeads, name: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    part = source.read(name, index)
    return part if part.dtype == dtype else part.astype(dtype)
