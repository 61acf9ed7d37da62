"""Random parameters made where they will lie: what benchmarks of a model's shapes need instead of its checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import ModelConfig
from jaxserve.execution.placement import prepare_params, stage_param_formats
from jaxserve.execution.step import StageParams, stage_param_shapes
from jaxserve.model.params import key_name, named_leaves
from jaxserve.model.quantized import random_leaf


@dataclass(frozen=True)
class DummyWeights:
    """Stands for a model's parameters where random ones will do."""

    seed: int = 0


OnTensor = Callable[[int, int], None]  # parameters made, of how many


def dummy_params(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, *, seed: int = 0, on_tensor: OnTensor | None = None
) -> StageParams:
    """``StageParams`` of random values on ``mesh`` in ``dtype``, V padded to divide over the mesh.

    Matrices are normal with standard deviation fan_in ** -0.5, norms near 1, biases and sinks near 0, as
    ``init_params`` makes them. Every array is made by its devices, each its own part: nothing is copied from the host,
    and one program is compiled for each distinct shape, not for each parameter.

    Args:
        config: of ``parallel.placed.placed_config``.
    """
    shapes = stage_param_shapes(config, mesh.shape["stage"], mesh.shape["tensor"])
    formats = stage_param_formats(config, mesh)

    @cache
    def maker(
        shape: tuple[int, ...], leaf_dtype: str | None, place_as: Format | NamedSharding, kind: str
    ) -> Callable[[int], jax.Array]:
        def make(number: jax.Array) -> jax.Array:
            if leaf_dtype is not None:
                return random_leaf(jax.random.fold_in(jax.random.key(seed), number), kind, shape, leaf_dtype)
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape, jnp.float32)
            match kind:
                case "norm":
                    noise = 1 - config.norm_offset + 0.1 * noise
                case "bias":
                    noise = 0.1 * noise
                case _:
                    noise = noise * shape[-1] ** -0.5
            return noise.astype(dtype)

        return jax.jit(make, out_shardings=place_as)

    named = list(zip(named_leaves(shapes), named_leaves(formats), strict=True))
    numbers = {name: number for number, ((name, _), _) in enumerate(named)}
    made: list[jax.Array] = []
    for (name, spec), (_, place_as) in named:
        kind = name.rpartition(".")[2] if spec.dtype else _kind(name)
        made.append(maker(spec.shape, spec.dtype, place_as, kind)(numbers[key_name(name, spec)]))
        if on_tensor is not None:
            # The next one's workspace comes on top of what is there: made one by one, it is one array's, not all's.
            made[-1].block_until_ready()
            on_tensor(len(made), len(named))
    jax.block_until_ready(made)
    return prepare_params(jax.tree.unflatten(jax.tree.structure(formats), made), mesh)


def _kind(name: str) -> str:
    if name.endswith("norm"):
        return "norm"
    return "bias" if name.endswith(("bias", "sinks")) else "matrix"
