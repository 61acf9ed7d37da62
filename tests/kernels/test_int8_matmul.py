"""8-bit matrix products, every implementation and type, against the dequantized matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int8_matmul import Int8Matrix, dequantize, int8_matmul, round_tokens
from tests.kernels.test_int4_matmul import SUM_ERROR, tokens

NAMES = ("implementation", "activations", "activation_group")
compiled = jax.jit(int8_matmul, static_argnames=NAMES)
INT8, FP8 = np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn)


def matrix(kind: str, dtype: np.dtype, group: int, has_bias: bool = False) -> tuple[Int8Matrix, np.ndarray]:
    """A matrix of [24, 256] and its values in float64, from its definition."""
    r, largest = np.random.default_rng(5), 127 if dtype == INT8 else 448
    if kind == "one hot":
        values = np.where(np.arange(256) == (np.arange(24) * 7)[:, None], largest, 0)
    elif kind == "max magnitude":
        values = np.where(r.random((24, 256)) < 0.5, -largest, largest)
    else:
        values = np.zeros((24, 256)) if kind == "zeros" else r.integers(-largest, largest + 1, (24, 256))
    q = values.astype(dtype)
    scale = (0.01 + r.random((24, 256 // group))).astype(np.float32)
    bias = r.standard_normal(scale.shape).astype(np.float32) if has_bias else None
    exact = q.astype(np.float64) * np.repeat(scale.astype(np.float64), group, 1)
    return Int8Matrix(q, scale, bias), exact if bias is None else exact + np.repeat(bias.astype(np.float64), group, 1)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("group, has_bias", [(32, True), (256, False)])
def test_products_are_those_of_the_dequantized_matrix(group, has_bias, dtype, implementation):
    parts = [matrix(kind, dtype, group, has_bias) for kind in ("random", "zeros", "one hot", "max magnitude")]
    exact = np.concatenate([values for _, values in parts])
    w = Int8Matrix(*(None if x[0] is None else np.concatenate(x) for x in zip(*(w for w, _ in parts))))
    x = tokens(256)
    for given_dtype, error in ((jnp.float32, SUM_ERROR), (jnp.bfloat16, 2**-7)):
        given = jnp.asarray(x, given_dtype)
        got = compiled(given, w, implementation=implementation)
        assert got.dtype == given_dtype
        x64 = np.asarray(given, np.float64)
        bound = np.abs(x64) @ np.abs(exact).T + 1e-30
        assert np.max(np.abs(np.asarray(got, np.float64) - x64 @ exact.T) / bound) < error


def test_w8a8_is_the_product_of_the_rounded_operands():
    w, _ = matrix("random", INT8, 256)
    x = np.random.default_rng(2).standard_normal((5, 256)).astype(np.float32) * np.array([[1e-3], [1], [30], [0], [1]])
    x32 = x.astype(np.float32)
    largest = np.abs(x32).max(1, keepdims=True).astype(np.float64)
    rounded = np.rint(x32 / np.where(largest == 0, 1, largest) * 127)
    want = (rounded @ w.q.astype(np.float64).T) * (largest / 127) * w.scale[:, 0]
    got = compiled(jnp.asarray(x32), w, activations="int8")
    # Where a value lies between two levels, either may be chosen: one step of one operand.
    step = largest / 127 * np.abs(w.q.astype(np.float64)).max() * w.scale[:, 0]
    assert np.all(np.abs(got - want) <= 2 * step + 1e-6 * np.abs(want))
    assert np.mean(np.abs(got - want) <= 1e-5 * np.abs(want) + 1e-9) > 0.9


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("group", [None, 64])
def test_rounded_tokens_are_near_and_scales_follow_the_largest(activations, group):
    x = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    rounded, scale = round_tokens(jnp.asarray(x), activations, group)
    size = group or 256
    np.testing.assert_allclose(
        scale, np.abs(x).reshape(4, -1, size).max(-1) / (127 if activations == "int8" else 448), rtol=1e-6
    )
    back = (np.asarray(rounded, np.float32).reshape(4, -1, size) * np.asarray(scale)[..., None]).reshape(4, 256)
    error = np.abs(back - x) if activations == "int8" else np.abs(back - x) / np.maximum(np.abs(x), 0.02)
    assert error.max() < (np.abs(x).max() / 127 * 0.51 if activations == "int8" else 2**-4 * 1.01)
    w, exact = matrix("random", FP8, 128)
    got = compiled(jnp.asarray(x), w, activations=activations, activation_group=group)
    np.testing.assert_allclose(got, back @ exact.T, rtol=1e-4, atol=1e-3)


def test_a_tokens_scale_may_come_from_all_devices():
    x = jnp.ones((2, 8))
    _, scale = round_tokens(x, "int8", None, lambda largest: largest * 4)
    np.testing.assert_allclose(scale, 4 / 127)


def test_dequantized():
    w, exact = matrix("random", INT8, 32, has_bias=True)
    np.testing.assert_allclose(dequantize(w), exact, rtol=1e-6, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused_with_both_numbers():
    w, _ = matrix("random", INT8, 32)
    with pytest.raises(ValueError, match=r"x \(2, 255\) must be \[M, D=256\]"):
        int8_matmul(jnp.ones((2, 255)), w)
    with pytest.raises(ValueError, match=r"scale \(24, 3\) must be \[F=24, D / G\] with a G that divides D=256"):
        dequantize(Int8Matrix(w.q, np.ones((24, 3), np.float32)))
    with pytest.raises(ValueError, match="activation_group=100 does not divide D=256"):
        int8_matmul(jnp.ones((2, 256)), w, activations="fp8", activation_group=100)
