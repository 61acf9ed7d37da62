"""The Hopper int4 product in the interpreter: its numbers against float64, its races, the packing, how it is cut."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int4_matmul import gpu_dequantize, gpu_product, gpu_stream, gpu_unpack
from pallas_kernels.int4_matmul.gpu import int4_matmul, prepare
from pallas_kernels.int4_matmul.gpu_stream import Tuning
from tests.kernels.gpu_interpreter import INTERPRET, races_found


class Matrix(NamedTuple):
    q: jax.Array  # [F, D/2]
    scale: jax.Array  # [F, D/G]
    bias: jax.Array | None


def matrix(seed, f, d, group, *, symmetric):
    """(the matrix, its weights in float64); scales of features differ by orders of magnitude."""
    r = np.random.default_rng(seed)
    numbers = r.integers(0, 16, (f, d))
    scale = (r.uniform(0.5, 2, (f, d // group)) * 10.0 ** r.integers(-7, 3, (f, 1))).astype(np.float16)
    scale = scale.astype(np.float32)
    zero = np.full(scale.shape, 8.0) if symmetric else r.integers(0, 16, scale.shape)
    bias = (-zero * scale).astype(np.float32)
    weight = np.repeat(scale.astype(np.float64), group, 1) * numbers + np.repeat(bias.astype(np.float64), group, 1)
    q = (numbers[:, 0::2] | numbers[:, 1::2] << 4).astype(np.uint8)
    return Matrix(jnp.asarray(q), jnp.asarray(scale), None if symmetric else jnp.asarray(bias)), weight


def check(out, x, weight):
    """Each output to the rounding of bfloat16, or to f32's and f16's of the terms that it is the sum of."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    want, terms = x @ weight.T, np.abs(x) @ np.abs(weight).T
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out.astype(jnp.float32), np.float64) - want)
    assert np.all(error <= np.abs(want) * 2**-8 + terms * 2**-11)


def tokens(seed, m, d):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, d)), jnp.bfloat16)


CASES = {
    # m, f, d, group, symmetric (or "whole": zero points as whole numbers), tuning
    "halves of a tile, pieces of a block": (1, 128, 1280, 128, True, Tuning(num_sms=3, ring=2)),
    "several blocks a stretch, groups of 32 with biases": (9, 384, 256, 32, False, Tuning(num_sms=2)),
    "more streams than tiles, groups of 64": (16, 128, 256, 64, True, Tuning(num_sms=5)),
    "four blocks of features": (24, 512, 256, 128, False, Tuning(num_sms=3, ring=2)),
    "two blocks of features, groups of 32": (33, 128, 256, 32, True, Tuning(num_sms=3, ring=2)),
    "two blocks of tokens": (70, 256, 256, 64, False, Tuning(num_sms=3)),
    "odd number of tiles, padded": (3, 72, 320, 32, False, Tuning(num_sms=2)),
    "one scale a row": (2, 136, 288, 288, False, Tuning(num_sms=2)),
    "whole blocks": (5, 384, 384, 128, False, Tuning(num_sms=2, ring=2, busy=0.7)),
    "halves of a tile, whole zero points": (1, 128, 768, 128, "whole", Tuning(num_sms=3, ring=2)),
    "groups of 32, whole zero points": (20, 256, 256, 32, "whole", Tuning(num_sms=2)),
    "two blocks of tokens, whole zero points": (70, 256, 256, 64, "whole", Tuning(num_sms=3)),
    "padded, whole zero points": (3, 72, 320, 64, "whole", Tuning(num_sms=2)),
    "one whole zero point a row": (2, 136, 288, 288, "whole", Tuning(num_sms=2)),
    "whole blocks of features and tokens": (70, 512, 128, 64, True, Tuning(num_sms=2, busy=0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    m, f, d, group, symmetric, tuning = CASES[name]
    w, weight = matrix(0, f, d, group, symmetric=symmetric is True)
    prepared = prepare(w, whole_zeros=symmetric == "whole")
    assert (prepared.bias is None, prepared.origin is None) == (symmetric is not False, symmetric != "whole")
    x = tokens(1, m, d)
    check(int4_matmul(x, prepared, tuning=tuning, interpret=INTERPRET), x, weight)
    assert not races_found()


def test_kernel_with_mosaics_own_conversion():
    w, weight = matrix(2, 256, 384, 128, symmetric=False)
    x = tokens(3, 20, 384)
    out = int4_matmul(x, prepare(w, repack=False), tuning=Tuning(num_sms=2, ring=2), interpret=INTERPRET)
    check(out, x, weight)
    assert not races_found()


@pytest.mark.parametrize("tuning", [Tuning(num_sms=3), Tuning(num_sms=2, busy=0.5), Tuning(many_tokens=4)])
def test_float32_keeps_more_than_the_rounding_of_bfloat16(tuning):
    w, weight = matrix(7, 256, 256, 128, symmetric=True)
    x = tokens(8, 5, 256)
    out = int4_matmul(x, prepare(w), out_dtype=jnp.float32, tuning=tuning, interpret=INTERPRET)
    assert out.dtype == jnp.float32
    x64 = np.asarray(x, np.float64)
    want, terms = x64 @ weight.T, np.abs(x64) @ np.abs(weight).T
    bound = terms * 2**-8 if tuning.many_tokens < 5 else np.abs(want) * 2**-16 + terms * 2**-20
    assert np.all(np.abs(np.asarray(out, np.float64) - want) <= bound)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_has_each_thread_s_operands_in_its_own_words(bits):
    """Against the registers of a matrix instruction as its manual has them, and the loads of a warpgroup."""
    numbers = np.random.default_rng(0).integers(0, 2**bits, (64, 128))
    words = gpu_unpack.pack(jnp.asarray(numbers, jnp.uint8), bits)
    values = numbers - 8 if bits == 4 else numbers.astype(np.int8)
    np.testing.assert_array_equal(gpu_unpack.unpack(words[0, 0], jnp.int32), values)
    flat = np.asarray(words).view(np.uint32).reshape(2, -1, 128, 4)  # half of the rows, load, thread, word
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for half in range(2):
            mine = flat[half, :, thread].reshape(-1)
            row = 16 * warp + lane // 4 + 8 * half
            for eight in range(16):  # columns: a register has two of each eight
                word, place = divmod(eight, 16 // bits)
                pair = [mine[word] >> (bits * place + b) & (2**bits - 1) for b in (0, 16)]
                column = 8 * eight + 2 * (lane % 4)
                assert pair == numbers[row, column : column + 2].tolist()


def test_nibbles_are_in_the_order_of_a_checkpoint():
    assert gpu_unpack.nibbles(jnp.array([[0x21, 0x43]], jnp.uint8)).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("warpgroups", [2, 4])
def test_a_block_asks_for_no_more_registers_than_it_started_with(warpgroups):
    started = 65536 // (128 * (warpgroups + 1)) // 8 * 8 * (warpgroups + 1)
    registers = gpu_stream.multiplying_registers(warpgroups)
    assert registers % 8 == 0
    assert started - 8 * warpgroups < registers * warpgroups + 24 <= started


def test_slots_lie_where_the_copy_engine_can_write():
    for tokens in range(8, 65, 8):
        for rows in (1, 2, 4, 8):
            slot = gpu_stream.aligned_rows(rows, 4 * tokens)
            assert rows <= slot < rows + 4 and slot * 4 * tokens % 128 == 0


def test_every_piece_has_one_place():
    for blocks_of_rows, steps, num_tokens in ((32, 32, 1), (224, 32, 16), (64, 112, 64), (6, 5, 300), (2, 1, 8)):
        split = gpu_stream.split_of(num_tokens, 2 * blocks_of_rows, steps, Tuning())
        counts = split.counts()
        steps //= split.along
        owner = np.arange(split.blocks * steps) // split.stretch
        assert owner.max() < 132
        for block, count in enumerate(counts):
            assert len(set(owner[block * steps : (block + 1) * steps])) == count <= split.pieces


@pytest.mark.parametrize(("group", "symmetric"), [(128, True), (32, False), (32, "whole")])
def test_many_tokens_take_the_dequantized_matrix(group, symmetric):
    w, weight = matrix(4, 72, {128: 256, 32: 192}[group], group, symmetric=symmetric is True)
    prepared = prepare(w, whole_zeros=symmetric == "whole")
    f, d = weight.shape
    padded = jnp.pad(prepared.row_scale, (0, -f % 128))
    arrays = prepared.weights, prepared.scale, prepared.bias, prepared.origin, padded
    got = gpu_dequantize.dequantize(*arrays, interpret=INTERPRET)
    assert not races_found()
    np.testing.assert_array_equal(np.asarray(got), np.asarray(gpu_product.dequantize(*arrays)))
    got = np.asarray(got, np.float64)[:f, :d]
    step = np.repeat(np.asarray(w.scale, np.float64), d // w.scale.shape[1], 1)
    assert np.all(np.abs(got - weight) <= np.abs(weight) * 2**-8 + step * 2**-7)
    x = tokens(5, 10, d)
    want, terms = np.asarray(x, np.float64) @ weight.T, np.abs(np.asarray(x, np.float64)) @ np.abs(weight).T
    for by_xla in (False, True):
        t = Tuning(many_tokens=9, xla_dequantizes=by_xla)
        error = np.abs(np.asarray(int4_matmul(x, prepared, tuning=t, interpret=INTERPRET), np.float64) - want)
        assert np.all(error <= np.abs(want) * 2**-8 + terms * 2**-8)


def test_zeros_one_hot_and_the_largest():
    """Adversarial inputs: a matrix of zero scales, one feature that is one, and the ends of every range."""
    r = np.random.default_rng(6)
    numbers = r.choice([0, 15], (128, 256))
    numbers[0] = 8
    scale = np.full((128, 2), 2.0**-40, np.float32)
    scale[1], scale[2], scale[3, 1] = 0, 2.0**100, 2.0**20
    weight = np.repeat(scale.astype(np.float64), 128, 1) * (numbers - 8)
    q = jnp.asarray(numbers[:, 0::2] | numbers[:, 1::2] << 4, jnp.uint8)
    prepared = prepare(Matrix(q, jnp.asarray(scale), None))
    x = jnp.zeros((8, 256), jnp.bfloat16).at[1, 77].set(1).at[2].set(2.0**14).at[3, 255].set(-(2.0**-20))
    out = int4_matmul(x, prepared, tuning=Tuning(num_sms=2), interpret=INTERPRET)
    got, want = np.asarray(out, np.float64), np.asarray(x, np.float64) @ weight.T
    assert np.all(got[0] == 0) and np.all(got[:, :2] == 0)
    features = [f for f in range(128) if f != 3]  # whose two scales are 2**60 apart
    np.testing.assert_array_equal(got[1, features], want[1, features])
    np.testing.assert_allclose(got[:, features], want[:, features], rtol=2**-8)


@pytest.mark.parametrize(
    ("q", "scale", "message"),
    [
        ((64, 100), (64, 3), "200 input features do not divide into 3 groups"),
        ((64, 96), (64, 4), "groups of 48 input features are none of"),
        ((64, 40), (64, 1), "80 input features are not a multiple of 32"),
    ],
)
def test_refused(q, scale, message):
    with pytest.raises(ValueError, match=message):
        prepare(Matrix(jnp.zeros(q, jnp.uint8), jnp.zeros(scale), None))


def test_x_of_another_matrix_is_refused():
    w = prepare(matrix(0, 128, 256, 128, symmetric=True)[0])
    for x in (tokens(0, 1, 128), tokens(0, 1, 384), jnp.zeros((1, 256), jnp.float32)):
        with pytest.raises(ValueError, match="256 inputs"):
            int4_matmul(x, w)
