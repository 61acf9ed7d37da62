"""The Hopper int8 product in the interpreter: its numbers against float64 and its races."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul.gpu_stream import Tuning
from pallas_kernels.int8_matmul.gpu import int8_matmul, prepare
from tests.kernels.gpu_interpreter import INTERPRET, races_found


class Matrix(NamedTuple):
    q: jax.Array  # [F, D]
    scale: jax.Array  # [F, 1]
    bias: jax.Array | None = None


def matrix(f, d):
    """(the matrix, its weights in float64): every value of int8, scales of different orders of magnitude."""
    r = np.random.default_rng(0)
    q = r.integers(-128, 128, (f, d), np.int8)
    scale = (r.uniform(0.5, 2, (f, 1)) * 10.0 ** r.integers(-7, 3, (f, 1))).astype(np.float32)
    return Matrix(jnp.asarray(q), jnp.asarray(scale)), q * scale.astype(np.float64)


CASES = {
    # m, f, d, tuning
    "halves of a tile": (3, 128, 1280, Tuning(num_sms=3, ring=2)),
    "four blocks of features, padded": (24, 200, 288, Tuning(num_sms=3)),
    "dequantized": (9, 200, 288, Tuning(many_tokens=8)),
    "dequantized by XLA": (9, 200, 288, Tuning(many_tokens=8, xla_dequantizes=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_product(name):
    m, f, d, tuning = CASES[name]
    w, weight = matrix(f, d)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((m, d)), jnp.bfloat16)
    out = int8_matmul(x, prepare(w), tuning=tuning, interpret=INTERPRET)
    x64 = np.asarray(x, np.float64)
    want, terms = x64 @ weight.T, np.abs(x64) @ np.abs(weight).T
    assert out.dtype == jnp.bfloat16
    assert np.all(
        np.abs(np.asarray(out, np.float64) - want)
        <= np.abs(want) * 2**-8 + terms * (2**-8 if m > tuning.many_tokens else 2**-20)
    )
    assert tuning.xla_dequantizes or not races_found()


@pytest.mark.parametrize(
    ("dtype", "groups", "bias"), [(jnp.int8, 2, None), (jnp.float8_e4m3fn, 1, None), (jnp.int8, 1, 0.0)]
)
def test_refused(dtype, groups, bias):
    w = Matrix(jnp.zeros((64, 128), dtype), jnp.zeros((64, groups)), None if bias is None else jnp.zeros((64, groups)))
    with pytest.raises(ValueError, match=r"takes int8 with scales \[64, 1\] and no biases"):
        prepare(w)


def test_x_of_another_matrix_is_refused():
    w = prepare(matrix(64, 256)[0])
    for x in (jnp.zeros((1, 128), jnp.bfloat16), jnp.zeros((1, 256), jnp.float32)):
        with pytest.raises(ValueError, match="256 inputs"):
            int8_matmul(x, w)
