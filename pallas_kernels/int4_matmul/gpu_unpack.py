"""Small integers from words on Mosaic GPU: the order of 64 features by 128 inputs, and how a thread reads them.

Of the left operand of a matrix instruction (64 rows) a thread of a warpgroup has two rows and of each 8 columns two. So
its 64 numbers of a tile are put into 8 words (of 4 bits) or 16 (of 8) that it reads 16 bytes at a time, neighbours
beside neighbours, and the two numbers of a register of the operand lie 16 bits apart: one instruction takes both out
and makes them bfloat16 (the way of Marlin, Frantar et al., 2024, for the registers of another instruction).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import arith, fragmented_array, ir, mosaic, plgpu, vector

ROWS = 64  # features of a tile: the rows of a warpgroup's matrix instruction
COLUMNS = 128  # inputs of a tile
WORD_COLUMNS = 128  # of a tile's words: (lane, word); its 2 * bits rows are (half, load, warp)
MIDDLE = 8  # what 4 bits count from, if nothing else: an operand is its number minus this; 8 bits are two's complement
ORIGIN = 128  # bfloat16 has all the whole numbers from here to 256, with the number in the last bits


def bits_of(word_rows: int) -> int:
    """4 or 8, from the rows of a tile's words."""
    return word_rows // 2


def pack(numbers: jax.Array, bits: int) -> jax.Array:
    """``[F, D]`` unsigned, of 4 bits or 8 -> ``[F/64, D/128, 2 bits, 128]`` int32.

    Word ``(4 (n h + m) + w, 16 r + 4 s + j)`` of a tile has at bit ``16 b + bits t`` row ``16 w + 8 h + r``, column
    ``8 (p (4 m + j) + t) + 2 s + b``, where a word has ``2 p`` numbers and a half is ``n`` loads.
    """
    f, d = numbers.shape
    pairs, loads = 16 // bits, bits // 4
    split = numbers.reshape(f // ROWS, 4, 2, 8, d // COLUMNS, loads, 4, pairs, 4, 2)  # [FB, w, h, r, KB, m, j, t, s, b]
    shape = split.shape
    t, b = (jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i in (7, 9))
    word = jnp.sum(split.astype(jnp.uint32) << (16 * b + bits * t), axis=(7, 9), dtype=jnp.uint32)
    word = word.transpose(0, 4, 2, 5, 1, 3, 7, 6)  # [FB, KB, h, m, w, r, s, j]
    return jax.lax.bitcast_convert_type(word.reshape(f // ROWS, d // COLUMNS, 2 * bits, WORD_COLUMNS), jnp.int32)


def nibbles(q: jax.Array) -> jax.Array:
    """``[F, D/2]`` uint8 -> ``[F, D]``: element 2i of a row is the low nibble of byte i, 2i + 1 the high one."""
    return jnp.stack([q & 15, q >> 4], axis=2).reshape(q.shape[0], -1)


def unpack(words: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """``[..., 2 bits, 128]`` int32 -> ``[..., 64, 128]``: each number's value, the inverse of ``pack``."""
    lead, bits = words.shape[:-2], bits_of(words.shape[-2])
    pairs, loads = 16 // bits, bits // 4
    shape = (*lead, 2, loads, 4, 8, 4, 4, pairs, 2)  # [..., h, m, w, r, s, j, t, b]
    t, b = (jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - i) for i in (2, 1))
    number = (words.reshape(*shape[:-2], 1, 1) >> (16 * b + bits * t)) & (2**bits - 1)
    value = number - MIDDLE if bits == 4 else number - 2 * (number & 128)
    n = len(lead)
    order = [n + i for i in (2, 0, 3, 1, 5, 6, 4, 7)]  # w, h, r, m, j, t, s, b
    return value.transpose(*range(n), *order).reshape(*lead, ROWS, COLUMNS).astype(dtype)


def load_words(ref: Any) -> Any:
    """A tile's words, ``[2 bits, 128]`` int32, from shared or device memory: 16 bytes at a time."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4))


def operands(words: Any, group: int, interpret: Any, origins: list[Any] | None = None) -> list[Any]:
    """What ``load_words`` has read -> the tile's groups as left operands, ``[64, group]`` bfloat16 each.

    Args:
        origins: for each group ``ORIGIN`` plus what the rows' nibbles count from, ``[64]`` bfloat16 of the operand's
            row layout; None is ``MIDDLE`` for all.

    The interpreter gets the same from ``unpack``: it has no inline code.
    """
    if interpret:
        tile = unpack(words)
        groups = [tile[:, g : g + group] for g in range(0, COLUMNS, group)]
        if origins is None:
            return groups
        return [x - (o - (ORIGIN + MIDDLE))[:, None] for x, o in zip(groups, origins, strict=True)]
    bits = bits_of(words.shape[0])
    layout = plgpu.Layout.WG_STRIDED(words.shape, vec_size=4)
    shape = plgpu.ShapeDtypeStruct((ROWS, group), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    rows = [plgpu.Layout.WGMMA.reduce(1)] * len(origins or ())

    @plgpu.inline_mgpu(arg_types=(layout, *rows), return_type=[shape] * (COLUMNS // group))
    def take_out(_, words, *origins):
        loaded = [vector.extract(four, [], [j]) for four in words.registers.flat for j in range(4)]
        per_word = 16 // bits * 8  # columns that a word has numbers of
        taken = []
        for place, word in enumerate(loaded):  # those of the upper half of the rows come first
            half, column = divmod(place * per_word, COLUMNS)
            origin = _twice(origins[column // group].registers.flat[half]) if origins else None
            taken += _pairs(word, bits, origin)
        registers = np.empty(2 * COLUMNS // 8, dtype=object)
        registers[:] = taken
        registers = registers.reshape(2, COLUMNS // 8).T  # [8 columns, half of the rows]
        layout = fragmented_array.WGMMA_LAYOUT
        return [
            fragmented_array.FragmentedArray(
                _registers=some.reshape(layout.registers_shape((ROWS, group))), _layout=layout, _is_signed=None
            )
            for some in np.split(registers, COLUMNS // group)
        ]

    return take_out(words, *(origins or ()))


# A number or-ed into the mantissa of 128 is 128 + number, as bfloat16 has 7 bits there; what it counts from,
# plus 128, is taken away exactly. Of 8 bits the highest goes into the exponent of another 128 and makes it 256: the
# difference is two's complement.
_NIBBLES = """{ .reg .b32 t; lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, $2; }"""
_BYTES = """{ .reg .b32 t, u; lop3.b32 t, $1, 0x007f007f, 0x43004300, 0xea;
lop3.b32 u, $1, 0x00800080, 0x43004300, 0xea; sub.rn.bf16x2 $0, t, u; }"""


def _twice(one: Any) -> Any:
    """A register with two of the bfloat16 that is in a vector of one."""
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    bits = arith.extui(i32, mosaic.utils.bitcast(vector.extract(one, [], [0]), i16))
    return arith.ori(bits, arith.shli(bits, mosaic.c(16, i32)))


def _pairs(word: Any, bits: int, origin: Any = None) -> list[Any]:
    """The registers of an operand that are in a word: two bfloat16 each. ``origin`` (of 4 bits) is what is taken from
    128 + number, twice; None is 128 + ``MIDDLE``."""
    i32 = ir.IntegerType.get_signless(32)
    origin = mosaic.c(0x43084308, i32) if origin is None else origin
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    found = []
    for shift in range(0, 16, bits):
        shifted = arith.shrui(word, mosaic.c(shift, i32)) if shift else word
        if bits == 4:
            pair = mosaic.utils.llvm.inline_asm(i32, [shifted, origin], _NIBBLES, "=r,r,r")
        else:
            pair = mosaic.utils.llvm.inline_asm(i32, [shifted], _BYTES, "=r,r")
        found.append(mosaic.utils.bitcast(pair, two))
    return found
