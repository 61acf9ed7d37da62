"""Parameters onto the mesh, each device's part read for itself: no host copy of the whole model.

Quantized matrices then get the layout that their kernels want, on the devices, one after another.
"""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from jaxserve.config import MatrixFormat, ModelConfig
from jaxserve.execution.step import StageParams, stage_param_shapes, stage_param_specs
from jaxserve.model.array_spec import ArraySpec
from jaxserve.model.params import ParamSource, TreeSource, layer_fields, named_leaves, path_name
from jaxserve.model.quantized import PER_BYTE, QuantizedMatrix
from jaxserve.model.stage_layers import stage_layers
from jaxserve.parallel.placed import ReplicatedHeads, copies_of_kv_heads
from jaxserve.parallel.specs import param_spec
from pallas_kernels import dispatch, int4_matmul, int8_matmul

READERS = 8  # threads at most; each holds one device's part of one parameter
# Matrices [..., out, in] of which GPUs have the output features contiguous in memory: XLA's products of few tokens read
# them faster so, 3 to 4 % of a decode step on an H100. On CPUs it is the other way round.
OUT_CONTIGUOUS = frozenset({"qkv", "attn_out", "gate_up", "down", "shared_gate_up", "shared_down", "head"})


def put_everywhere(array: np.ndarray, replicated: NamedSharding) -> jax.Array:
    """``array`` on every device of a mesh. Where other processes have some of them, each puts its own, the same.

    Not by ``jax.device_put`` then, which compares the processes' arrays by a collective each time.
    """
    if replicated.is_fully_addressable:
        return jax.device_put(array, replicated)
    parts = [jax.device_put(array, device) for device in replicated.addressable_devices]
    return jax.make_array_from_single_device_arrays(array.shape, replicated, parts)


def stage_param_formats(config: ModelConfig, mesh: Mesh) -> StageParams:
    """Sharding of each parameter of a ``StageParams``, and its layout in memory where that is not the default.

    ``config`` is of ``parallel.placed.placed_config``. A step that is lowered for the placed arrays takes them as they
    lie.
    """
    num_stages = mesh.shape["stage"]
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    shapes, specs = stage_param_shapes(config, num_stages, mesh.shape["tensor"]), stage_param_specs(config, num_stages)

    def format_of(name: str, ndim: int, spec: PartitionSpec) -> Format | NamedSharding:
        sharding = NamedSharding(mesh, spec)
        if not is_gpu or name.rpartition(".")[2] not in OUT_CONTIGUOUS:
            return sharding
        before = 1 if is_layer(name) else 0  # the ST axis stays first
        return Format(Layout((*range(before), ndim - 1, *range(before, ndim - 1))), sharding)

    leaves = [
        format_of(name, len(spec.shape), p)
        for (name, spec), (_, p) in zip(named_leaves(shapes), named_leaves(specs), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(specs), leaves)


def place_params(
    source: ParamSource,
    config: ModelConfig,
    placed: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    on_parameter: Callable[[int, int], None] | None = None,
) -> StageParams:
    """The parameters of ``source`` on the mesh in ``dtype`` (quantized ones in their own); V is padded to divide over
    the mesh.

    Args:
        source: of ``config``'s parameters.
        placed: ``parallel.placed.placed_config`` of ``config``.
        on_parameter: called with (done, total) after each, from any thread, one at a time.
    """
    num_stages, tensor = mesh.shape["stage"], mesh.shape["tensor"]
    copies = copies_of_kv_heads(config, tensor)
    heads = ReplicatedHeads(source, config, copies)
    shapes, formats = stage_param_shapes(placed, num_stages, tensor), stage_param_formats(placed, mesh)
    # A live array may stay on its devices.
    is_plain = num_stages == 1 and copies == 1 and not mesh.is_multi_process
    done, lock = 0, threading.Lock()

    def place(name: str, spec: ArraySpec, place_as: Format | NamedSharding) -> jax.Array:
        nonlocal done
        leaf_dtype = jnp.dtype(spec.dtype or dtype)
        live = source.array(name) if is_plain and isinstance(source, TreeSource) else None
        if isinstance(live, jax.Array) and live.size == math.prod(spec.shape):
            array = jax.device_put(live.reshape(spec.shape).astype(leaf_dtype), place_as)
        else:

            def read(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return _part(heads, placed, num_stages, name, spec, index, leaf_dtype)

            array = jax.make_array_from_callback(spec.shape, place_as, read)
        with lock:
            done += 1
            if on_parameter is not None:
                on_parameter(done, len(jobs))
        return array

    jobs = [
        (name, spec, place_as)
        for (name, spec), (_, place_as) in zip(named_leaves(shapes), named_leaves(formats), strict=True)
    ]
    # Live arrays not by threads: what reads or moves their parts may be a collective, and two of them at once can wait
    # for each other. Nor the smallest parameter: JAX makes the Python type that goes over a list of devices when it
    # first needs it, and a second thread that needs it meanwhile ends the process (nanobind's make_iterator, if an
    # audit hook lets go of the interpreter's lock).
    smallest = min(range(len(jobs)), key=lambda i: math.prod(jobs[i][1].shape))
    here = range(len(jobs)) if isinstance(source, TreeSource) and source.is_on_devices else (smallest,)
    leaves = {i: place(*jobs[i]) for i in here}
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        rest = [i for i in range(len(jobs)) if i not in leaves]
        leaves |= zip(rest, pool.map(lambda i: place(*jobs[i]), rest), strict=True)
    return prepare_params(jax.tree.unflatten(jax.tree.structure(formats), [leaves[i] for i in range(len(jobs))]), mesh)


def copied_params(params: StageParams, mesh: Mesh) -> StageParams:
    """Placed parameters on another mesh of as many devices of the same kind: what one device holds is copied to the
    one in its place, as it lies there. Nothing is read or computed again."""

    def copied(array: jax.Array) -> jax.Array:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        to = dict(zip(sharding.mesh.devices.flat, mesh.devices.flat, strict=True))
        parts = [jax.device_put(shard.data, to[shard.device]) for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, sharding.spec), parts)

    return jax.tree.map(copied, params)


def prepare_params(params: StageParams, mesh: Mesh) -> StageParams:
    """The same with every quantized matrix of the layers, and the head, in the layout of the kernel that multiplies
    with it. What a kernel's ``prepare`` makes of a device's part lies on that device: those arrays have a leading ST
    axis, and their next one is the parts' one after another."""

    def prepared(path: tuple, matrix: Any) -> Any:
        if not isinstance(matrix, QuantizedMatrix):
            return matrix
        name = path_name(path)
        local = matrix.q.sharding.shard_shape(matrix.q.shape)
        hopper = _hopper_kernel(matrix, dtype) if name != "embed" and "experts" not in name else None
        # Rows of an embedding are taken by themselves, and experts' matrices are put together again.
        implementation = dispatch.best_quantized_matmul(mesh.devices.flat[0], hopper=hopper)
        kernel = int4_matmul if matrix.format.kind == "int4" else int8_matmul
        if hopper is None or implementation not in kernel.PREPARE:
            return replace(matrix, implementation=implementation)
        lead = is_layer(name)
        specs = tuple(None if x is None else x.sharding.spec for x in (matrix.q, matrix.scale, matrix.bias))
        make = _preparer(mesh, matrix.format, implementation, lead, specs)
        return replace(
            matrix,
            q=None,
            scale=None,
            bias=None,
            prepared=make(matrix.q, matrix.scale, matrix.bias),
            prepared_shape=(*local[lead:-1], local[-1] * PER_BYTE[matrix.format.kind]),
            implementation=implementation,
        )

    dtype = params.final_norm.dtype
    return jax.tree_util.tree_map_with_path(prepared, params, is_leaf=lambda x: isinstance(x, QuantizedMatrix))


@cache  # a function for all the matrices of a kind: what it compiles it finds again by their shapes
def _preparer(
    mesh: Mesh, form: MatrixFormat, implementation: dispatch.Implementation, lead: bool, specs: tuple[P | None, ...]
) -> Callable[..., Any]:
    """From q, scale and bias as they are placed, by ``specs``, to what the kernel for them takes."""

    def prepare_part(q: jax.Array, scale: jax.Array, bias: jax.Array | None) -> Any:
        parts = [x if x is None else x[0] if lead else x for x in (q, scale, bias)]
        flat = [x if x is None else x.reshape(-1, x.shape[-1]) for x in parts]
        if form.kind == "int4":
            made = int4_matmul.prepare(
                int4_matmul.Int4Matrix(*flat), whole_zeros=form.has_whole_zeros, implementation=implementation
            )
        else:
            made = int8_matmul.prepare(int8_matmul.Int8Matrix(*flat), implementation=implementation)
        return jax.tree.map(lambda x: x[None], made) if lead else made

    own = P("stage", "tensor") if lead else param_spec(("vocab",))
    return jax.jit(jax.shard_map(prepare_part, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False))


def _hopper_kernel(matrix: QuantizedMatrix, dtype: jnp.dtype) -> str | None:
    """The kernel for Hopper that multiplies with a placed matrix, in a model of ``dtype``; None if none does."""
    local = matrix.q.sharding.shard_shape(matrix.q.shape)
    groups = matrix.scale.sharding.shard_shape(matrix.scale.shape)[-1]
    form = matrix.format
    if dtype != jnp.bfloat16 or form.activations != "none":
        return None
    if form.kind == "int4":
        refused = int4_matmul.gpu.refusal(math.prod(local[:-1]), 2 * local[-1], groups)
        return "int4_matmul" if refused is None else None
    return "int8_matmul" if form.kind == "int8" and form.group_size is None and not form.has_bias else None


def is_layer(name: str) -> bool:
    """Whether a parameter of ``StageParams`` has a leading ST axis."""
    return name.startswith("layers.")


def _part(
    source: ReplicatedHeads,
    placed: ModelConfig,
    num_stages: int,
    name: str,
    spec: ArraySpec,
    index: tuple[slice, ...],
    dtype: jnp.dtype,
) -> np.ndarray:
    """Part ``index`` of a parameter of ``StageParams`` whose whole is ``spec``."""
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, spec.shape, strict=True))
    if not is_layer(name):
        if spec.axes[0] != "vocab":
            return _read(source, name, index, dtype)
        rows, columns = index  # V may be padded
        given = slice(min(rows.start, placed.vocab_size), min(rows.stop, placed.vocab_size))
        out = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
        if given.start < given.stop:
            out[: given.stop - given.start] = _read(source, name, (given, columns), dtype)
        return out
    _, position, leaf = name.split(".", 2)
    field = leaf.partition(".")[0]
    parts = []
    for own in stage_layers(placed, num_stages)[index[0]]:
        layer = own[int(position)] if int(position) < len(own) else None
        if layer is not None and field in layer_fields(placed, layer):
            parts.append(_read(source, f"layers.{layer}.{leaf}", index[1:], dtype))
        else:  # only another stage has a layer at this place, or one of this kind
            parts.append(np.zeros([s.stop - s.start for s in index[1:]], dtype))
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def _read(source: ReplicatedHeads, name: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    part = source.read(name, index)
    return part if part.dtype == dtype else part.astype(dtype)
