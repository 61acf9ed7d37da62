"""Random parameters made where they will lie: what benchmarks of a model's shapes need instead of its checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.config import ModelConfig
from jaxserve.execution.step import StageParams, stage_param_specs
from jaxserve.model.params import ArraySpec, named_leaves, param_specs

OnTensor = Callable[[int, int], None]  # parameters made, of how many


def dummy_params(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, *, seed: int = 0, on_tensor: OnTensor | None = None
) -> StageParams:
    """``StageParams`` of random values on ``mesh`` in ``dtype``, V padded to divide over tensor.

    Matrices are normal with standard deviation fan_in ** -0.5, norms near 1, biases and sinks near 0, as
    ``init_params`` makes them. Every array is made by its devices, each its own part: nothing is copied from the host,
    and one program is compiled for each distinct shape, not for each parameter.
    """
    num_stages, tensor = mesh.shape["stage"], mesh.shape["tensor"]
    stage_specs = stage_param_specs(config, num_stages)
    canonical = param_specs(config)
    # Layer i of every stage is one array, so the shapes of the first stage's layers are those of all.
    shapes = replace(canonical, layers=canonical.layers[: len(stage_specs.layers)])

    def resident(name: str, spec: ArraySpec) -> tuple[int, ...]:
        size = (n + -n % tensor if axis == "vocab" else n for n, axis in zip(spec.shape, spec.axes, strict=True))
        return ((num_stages,) if name.startswith("layers.") else ()) + tuple(size)

    leaves = {name: resident(name, spec) for name, spec in named_leaves(shapes)}
    specs: dict[str, P] = dict(_named(stage_specs))
    if leaves.keys() != specs.keys():
        raise ValueError(f"parameters and their partition differ in {sorted(leaves.keys() ^ specs.keys())}")

    @cache
    def maker(shape: tuple[int, ...], spec: P, kind: str) -> Callable[[int], jax.Array]:
        def make(number: jax.Array) -> jax.Array:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape, jnp.float32)
            match kind:
                case "norm":
                    noise = 1 - config.norm_offset + 0.1 * noise
                case "bias":
                    noise = 0.1 * noise
                case _:
                    noise = noise * shape[-1] ** -0.5
            return noise.astype(dtype)

        return jax.jit(make, out_shardings=NamedSharding(mesh, spec))

    made: list[jax.Array] = []
    for number, (name, shape) in enumerate(leaves.items()):
        made.append(maker(shape, specs[name], _kind(name))(number))
        if on_tensor is not None:
            # The next one's workspace comes on top of what is there: made one by one, it is one array's, not all's.
            made[-1].block_until_ready()
            on_tensor(number + 1, len(leaves))
    jax.block_until_ready(made)
    by_name = dict(zip(leaves, made, strict=True))
    tree = jax.tree.unflatten(
        jax.tree.structure(stage_specs, is_leaf=_is_partition), [by_name[name] for name, _ in _named(stage_specs)]
    )
    return tree


def _kind(name: str) -> str:
    if name.endswith("norm"):
        return "norm"
    return "bias" if name.endswith(("bias", "sinks")) else "matrix"


def _is_partition(x: Any) -> bool:
    return isinstance(x, P)


def _named(tree: StageParams) -> list[tuple[str, P]]:
    """(name, PartitionSpec) of every parameter, named as in ``params.named_leaves``."""
    return [
        (".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_partition)[0]
    ]
