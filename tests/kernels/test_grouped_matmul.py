"""The grouped matrix product, both implementations, against a product for each row in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul

compiled = jax.jit(grouped_matmul, static_argnames=("implementation",))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "sizes",
    [[3], [0, 0, 5], [1, 0, 2, 0], [8, 8, 16], [7, 9, 0, 1], [0, 300, 1, 0, 65], [1] * 40, [0] * 30 + [2, 3]],
    ids=str,
)
def test_every_row_meets_its_groups_matrix(implementation, sizes):
    r = np.random.default_rng(0)
    x = r.standard_normal((sum(sizes), 24))
    w = r.standard_normal((len(sizes), 10, 24))
    want = np.einsum("md,mfd->mf", x, w[np.repeat(np.arange(len(sizes)), sizes)])
    args = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(sizes, jnp.int32)
    np.testing.assert_allclose(compiled(*args, implementation=implementation), want, atol=2e-5)
    half = compiled(args[0].astype(jnp.bfloat16), args[1].astype(jnp.bfloat16), args[2], implementation=implementation)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.3)


def test_matrices_of_groups_without_rows_are_not_read():
    w = jnp.full((4, 6, 8), jnp.nan).at[2].set(1.0)
    out = compiled(jnp.ones((5, 8)), w, jnp.array([0, 0, 5, 0], jnp.int32))
    np.testing.assert_array_equal(out, np.full((5, 6), 8.0))


def test_shapes_that_do_not_fit_are_refused_with_both_numbers():
    x, w, sizes = jnp.ones((5, 8)), jnp.ones((3, 6, 8)), jnp.array([1, 2, 2], jnp.int32)
    with pytest.raises(ValueError, match=r"x \(5, 8\) must be \[M, D\] and w \(3, 6, 7\)"):
        grouped_matmul(x, w[:, :, :7], sizes)
    with pytest.raises(ValueError, match=r"group_sizes \(2,\) must be \[E=3\]"):
        grouped_matmul(x, w, sizes[:2])
