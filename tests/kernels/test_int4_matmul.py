"""4-bit matrix products, every implementation, against the dequantized matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import row_chunks
from pallas_kernels.int4_matmul import Int4Matrix, dequantize, int4_matmul, prepare

compiled = jax.jit(int4_matmul, static_argnames=("implementation",))
KINDS = ("random", "zeros", "one hot", "max magnitude")
# Of a sum of 256 products in float32, relative to the sum of their magnitudes, in whatever order they are added (which
# is the processor's): a rounding for each (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and
# those of an operand.
SUM_ERROR = (256 + 3) * 2**-24


def nibbles(kind: str, rows: int, columns: int) -> np.ndarray:
    """``[rows, columns]`` of 0..15."""
    r = np.random.default_rng(rows + columns)
    if kind == "random":
        return r.integers(0, 16, (rows, columns))
    if kind == "zeros":
        return np.zeros((rows, columns), int)
    if kind == "one hot":
        return np.where(np.arange(columns) == (np.arange(rows) * 7 % columns)[:, None], 15, 8)
    return np.where(r.random((rows, columns)) < 0.5, 0, 15)


def pack(values: np.ndarray) -> np.ndarray:
    return (values[:, 0::2] + 16 * values[:, 1::2]).astype(np.uint8)


def matrix(kind: str, rows: int, columns: int, group: int, symmetric: bool) -> tuple[Int4Matrix, np.ndarray]:
    """A matrix and its values in float64, from its definition."""
    r = np.random.default_rng(3)
    values = nibbles(kind, rows, columns)
    largest = 1e3 if kind == "max magnitude" else 1.0
    scale = (largest * (0.1 + r.random((rows, columns // group)))).astype(np.float32)
    bias = None if symmetric else (-scale * r.integers(0, 17, scale.shape)).astype(np.float32)
    offset = -8 * scale.astype(np.float64) if bias is None else bias.astype(np.float64)
    w = np.repeat(scale.astype(np.float64), group, 1) * values + np.repeat(offset, group, 1)
    return Int4Matrix(pack(values), scale, bias), w


def tokens(columns: int) -> np.ndarray:
    r = np.random.default_rng(1)
    return np.concatenate([r.standard_normal((3, columns)), np.zeros((1, columns)), np.eye(columns)[[0, 1, -1]],
                           np.full((1, columns), 1e4)])  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [32, 128])
def test_products_are_those_of_the_dequantized_matrix(group, symmetric, implementation):
    parts = [matrix(kind, 6, 256, group, symmetric) for kind in KINDS]
    exact = np.concatenate([values for _, values in parts])
    w = Int4Matrix(*(None if x[0] is None else jnp.concatenate(x) for x in zip(*(w for w, _ in parts))))
    prepared = prepare(w, implementation=implementation)
    x = tokens(256)
    for dtype, error in ((jnp.float32, SUM_ERROR), (jnp.bfloat16, 2**-7)):
        given = jnp.asarray(x, dtype)
        got = compiled(given, prepared, implementation=implementation)
        assert got.dtype == dtype
        x64 = np.asarray(given, np.float64)
        bound = np.abs(x64) @ np.abs(exact).T + 1e-30  # an error is relative to what was summed
        assert np.max(np.abs(np.asarray(got, np.float64) - x64 @ exact.T) / bound) < error
    assert int4_matmul(given, prepared, implementation=implementation, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("rows", [1, 7, 9, 40])
def test_chunks_cover_every_row(monkeypatch, rows):
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", {"few": 8 * 64, "many": 8 * 64})
    w, exact = matrix("random", rows, 64, 32, False)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(lambda x, w: int4_matmul(x, w))(x, w), x @ exact.T, rtol=1e-4, atol=1e-3)


def test_dequantized_is_exact_where_the_scales_are_powers_of_two():
    w = matrix("random", 6, 64, 32, False)[0]
    scale = np.exp2(np.round(np.log2(w.scale)))
    w = Int4Matrix(w.q, scale, -3 * scale)
    values = np.stack([w.q & 15, w.q >> 4], -1).reshape(6, 64) - 3.0
    np.testing.assert_array_equal(dequantize(w), values * np.repeat(scale, 32, 1))


def test_shapes_that_do_not_fit_are_refused_with_both_numbers():
    w, _ = matrix("random", 6, 64, 32, False)
    with pytest.raises(ValueError, match=r"x \(2, 62\) must be \[M, D=64\]"):
        int4_matmul(jnp.ones((2, 62)), w)
    with pytest.raises(ValueError, match=r"scale \(6, 3\) must be \[F=6, D / G\] with an even G that divides D=64"):
        prepare(Int4Matrix(w.q, np.ones((6, 3), np.float32)))
    with pytest.raises(ValueError, match=r"bias \(6, 1\) must be as scale \(6, 2\)"):
        prepare(Int4Matrix(w.q, w.scale, np.ones((6, 1), np.float32)))
    with pytest.raises(ValueError, match=r"q \(6, 32\) int8 must be \[F, D / 2\] uint8"):
        prepare(Int4Matrix(w.q.view(np.int8), w.scale))
    with pytest.raises(ValueError, match="implementation='nothing' does not exist"):
        int4_matmul(jnp.ones((2, 64)), w, implementation="nothing")  # pyright: ignore[reportArgumentType]
