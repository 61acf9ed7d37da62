"""Random parameters on the mesh: the tree, shapes, dtype and sharding of real ones, a program for each shape only."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ParallelConfig
from jaxserve.execution.compile_counter import CompileCounter
from jaxserve.execution.dummy import dummy_params
from jaxserve.execution.placement import place_params
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(stage=2, tensor=2)])
@pytest.mark.parametrize("tied", [False, True])
def test_they_lie_as_placed_ones_do(parallel: ParallelConfig, tied: bool):
    config, mesh = replace(tiny.CONFIG, tie_word_embeddings=tied), make_mesh(parallel)
    source = TreeSource(init_params(config, jax.random.key(0)), config)
    real = place_params(source, config, config, mesh, jnp.dtype(jnp.bfloat16))
    made = dummy_params(config, mesh, jnp.dtype(jnp.bfloat16))

    def about(x: jax.Array) -> Any:
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(about, made) == jax.tree.map(about, real)


def test_values_are_those_of_a_freshly_initialised_model():
    config = replace(tiny.CONFIG, hidden_size=256, vocab_size=1000)
    made = dummy_params(config, make_mesh(ParallelConfig()), jnp.dtype(jnp.float32))
    norm, matrix = np.asarray(made.layers[0].attn_norm), np.asarray(made.layers[1].gate_up)
    assert abs(norm.mean() - 1) < 0.05 and 0.05 < norm.std() < 0.15
    assert abs(matrix.mean()) < 1e-3 and matrix.std() == pytest.approx(256**-0.5, rel=0.02)
    assert not np.array_equal(matrix, np.asarray(made.layers[2].gate_up))
    assert not np.array_equal(np.asarray(made.embed), np.asarray(made.head))


def test_one_program_a_shape():
    """Eight layers compile no more than four do."""

    def programs(num_layers: int) -> int:
        counter = CompileCounter()
        with counter.watch():
            dummy_params(
                replace(tiny.CONFIG, num_layers=num_layers), make_mesh(ParallelConfig()), jnp.dtype(jnp.float32)
            )
        counter.close()
        return counter.count

    programs(1)  # what jax compiles for itself, once
    assert programs(8) == programs(2) > 0
