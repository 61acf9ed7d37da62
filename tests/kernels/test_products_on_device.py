"""The quantized and the grouped products on a GPU against the references there; small ones wherever tests run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench.ceilings import random_normal
from jaxserve.bench.kernel_inputs import int4_matrix, int8_matrix
from pallas_kernels import int4_matmul as int4
from pallas_kernels import int8_matmul as int8
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.int4_matmul.gpu_stream import Tuning

OUTPUT = 2**-8  # rounding to bfloat16, twice what it can be
compiled_grouped = jax.jit(grouped_matmul, static_argnames=("implementation",))
MANY = Tuning().many_tokens + 188  # the matrix is dequantized by a kernel, and XLA multiplies


def products(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x @ w.T`` in float32, and the sum of the magnitudes of its terms."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)

    x = x.astype(jnp.float32)
    return product(x, w), product(jnp.abs(x), jnp.abs(w))


@jax.jit
def excess(out: jax.Array, want: jax.Array, sums: jax.Array, output: float, terms: float) -> jax.Array:
    """The largest error of ``out`` as a share of what may be: of ``output`` times what is wanted, and ``terms`` times
    the magnitudes that it is the sum of. NaN is infinite."""
    share = jnp.abs(out.astype(jnp.float32) - want) / (output * jnp.abs(want) + terms * sums)
    return jnp.max(jnp.where(jnp.isnan(share), jnp.inf, share))


class Int4(NamedTuple):
    num_tokens: int
    num_features: int
    num_inputs: int
    group: int = 128
    symmetric: bool = True
    whole_zeros: bool = False  # where it is not symmetric


LLAMA_8B = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SMOLLM2_135M = {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536)}
QWEN_05B = {"qkv": (1152, 896), "gate_up": (9728, 896), "down": (896, 4864)}
INT4 = [
    *(Int4(m, *LLAMA_8B["qkv"]) for m in (1, 9, 64)),
    *(Int4(m, *LLAMA_8B["gate_up"]) for m in (16, MANY)),
    Int4(256, *LLAMA_8B["down"]),
    *(Int4(m, *LLAMA_8B["out"], symmetric=False) for m in (1, 17, 256, MANY)),
    *(Int4(m, *LLAMA_8B["out"], symmetric=False, whole_zeros=True) for m in (1, 17, 256, MANY)),
    Int4(256, *LLAMA_8B["gate_up"], symmetric=False, whole_zeros=True),
    Int4(64, *SMOLLM2_135M["gate_up"], group=32, symmetric=False, whole_zeros=True),
    Int4(16, *LLAMA_8B["gate_up"], symmetric=False),
    Int4(64, *SMOLLM2_135M["qkv"], group=32),
    Int4(8, *SMOLLM2_135M["gate_up"], group=64, symmetric=False),
    Int4(MANY, *SMOLLM2_135M["down"], group=32, symmetric=False),
    Int4(5, *QWEN_05B["qkv"], symmetric=False),
    Int4(100, *QWEN_05B["down"]),
    Int4(5, 200, 1504, group=32, symmetric=False),  # padded
    Int4(20, 640, 512, group=512, symmetric=False),  # a scale a row
]


def check_int4(case: Int4, implementation: Any, dtype: Any = jnp.bfloat16) -> None:
    m, f, d, group, symmetric, whole_zeros = case
    w = int4_matrix(f, d, group=group, symmetric=symmetric, seed=m)
    x = random_normal(m, (m, d), dtype)
    prepared = int4.prepare(w, whole_zeros=whole_zeros, implementation=implementation)
    out = int4.int4_matmul(x, prepared, implementation=implementation)
    assert out.dtype == dtype
    # Scales are rounded to float16 beside each other, weights to bfloat16 where XLA multiplies.
    rounded = implementation != "mosaic_gpu" or m > Tuning().many_tokens
    terms = 2**-20 if dtype == jnp.float32 else 2**-8 if rounded else 2**-11
    want, sums = jax.jit(lambda x, w: products(x, int4.dequantize(w)))(x, w)
    assert out.shape == want.shape
    assert excess(out, want, sums, 2**-20 if dtype == jnp.float32 else OUTPUT, terms) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", INT4, ids=str)
def test_int4(case):
    check_int4(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_int4_by_xla(dtype):
    check_int4(Int4(16, *LLAMA_8B["qkv"]), "xla", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64])
def test_int4_gives_the_same_bits_again(m):
    """An error that moves would be a race."""
    w = int4.prepare(int4_matrix(6144, 4096, group=128, symmetric=False), implementation="mosaic_gpu")
    x = random_normal(m, (m, 4096))
    outs = [int4.int4_matmul(x, w, implementation="mosaic_gpu") for _ in range(50)]
    assert all(jnp.array_equal(out, outs[0]) for out in outs[1:])


INT8 = [
    *((m, *LLAMA_8B["qkv"]) for m in (1, 64, MANY)),
    (16, *LLAMA_8B["gate_up"]),
    (256, *LLAMA_8B["down"]),
    (9, *SMOLLM2_135M["down"]),
    (5, *QWEN_05B["qkv"]),
    (100, 200, 1504),  # padded
]


def check_int8(m: int, f: int, d: int, implementation: Any, dtype: Any = jnp.int8) -> None:
    w = int8_matrix(f, d, dtype=dtype, seed=m)
    x = random_normal(m, (m, d))
    out = int8.int8_matmul(x, int8.prepare(w, implementation=implementation), implementation=implementation)
    assert out.dtype == jnp.bfloat16
    rounded = implementation != "mosaic_gpu" or m > Tuning().many_tokens
    want, sums = jax.jit(lambda x, w: products(x, int8.dequantize(w)))(x, w)
    assert out.shape == want.shape
    assert excess(out, want, sums, OUTPUT, 2**-8 if rounded else 2**-14) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("m, f, d", INT8)
def test_int8(m, f, d):
    check_int8(m, f, d, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_int8_and_fp8_by_xla(dtype):
    check_int8(16, *LLAMA_8B["qkv"], implementation="xla", dtype=dtype)


def check_rounded_activations(m: int, f: int, d: int) -> None:
    """Both operands of 8 bits: their sums are exact."""
    w, x = int8_matrix(f, d), random_normal(m, (m, d))
    out = int8.int8_matmul(x, w, activations="int8", out_dtype=jnp.float32)
    rounded, scale = (np.asarray(a, np.float64) for a in int8.round_tokens(x, "int8"))
    want = rounded @ np.asarray(w.q, np.float64).T * scale * np.asarray(w.scale, np.float64).T
    np.testing.assert_allclose(np.asarray(out), want, rtol=2**-21)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64])
def test_rounded_activations(m):
    check_rounded_activations(m, *SMOLLM2_135M["gate_up"])


GROUPED = {  # tokens times experts of each, [E, F, D]
    "olmoe, 8 tokens": (64, (64, 2048, 2048)),
    "qwen 3 30b-a3b, 32 tokens": (256, (128, 1536, 2048)),
    "two experts": (100, (2, 640, 512)),
}


def check_grouped(num_rows: int, shape: tuple[int, int, int], implementation: Any, dtype: Any) -> None:
    """Half of the groups have no rows."""
    num_groups, f, d = shape
    groups = np.random.default_rng(num_rows).integers(0, num_groups, num_rows) // 2 * 2
    sizes = jnp.asarray(np.bincount(groups, minlength=num_groups), jnp.int32)
    x, w = random_normal(0, (num_rows, d), dtype), random_normal(1, shape, dtype, scale=d**-0.5)
    out = compiled_grouped(x, w, sizes, implementation=implementation)
    assert out.dtype == dtype and out.shape == (num_rows, f)
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    want, sums = compiled_grouped(x, w, sizes), compiled_grouped(jnp.abs(x), jnp.abs(w), sizes)
    assert excess(out, want, sums, OUTPUT if dtype == jnp.bfloat16 else 2**-20, 2**-18) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped(name, dtype):
    check_grouped(*GROUPED[name], implementation="xla", dtype=dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_small_shapes(implementation):
    """So that what is run on a device has been run."""
    for dtype in (jnp.bfloat16, jnp.float32):
        check_int4(Int4(3, 24, 64, group=32, symmetric=False), implementation, dtype)
        check_grouped(11, (4, 24, 16), implementation, dtype)
    check_int4(Int4(3, 24, 64, group=64), implementation)
    check_int8(3, 24, 64, implementation)
    check_int8(3, 24, 64, implementation, jnp.float8_e4m3fn)
    check_rounded_activations(3, 24, 64)


@pytest.mark.parametrize("wrong", [float("nan"), 1.05, 0.0])
def test_one_wrong_output_is_noticed(wrong):
    want, sums = products(random_normal(0, (3, 64)), random_normal(1, (24, 64), jnp.float32))
    assert excess(want.astype(jnp.bfloat16), want, sums, OUTPUT, 2**-11) < 1
    assert excess(want.at[1, 2].multiply(wrong), want, sums, OUTPUT, 2**-11) > 1
