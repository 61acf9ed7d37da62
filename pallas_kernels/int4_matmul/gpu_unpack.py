"""Nibbles from words on Mosaic GPU: the order of 64 features by 128 inputs in memory, and how a thread reads them.

Of the left operand of a matrix instruction (64 rows) a thread of a warpgroup has two rows and of each 8 columns two. So
its 64 nibbles of a tile are put into eight words that it reads with two loads of 16 bytes, neighbours beside
neighbours, and the two nibbles of a register of the operand lie 16 bits apart: one instruction takes both out and makes
them bfloat16 numbers (the way of Marlin, Frantar et al., 2024, for the registers of another instruction).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

plgpu: Any = mosaic_gpu  # much of it has no types that a checker can follow

ROWS = 64  # features of a tile: the rows of a warpgroup's matrix instruction
COLUMNS = 128  # inputs of a tile
WORD_ROWS, WORD_COLUMNS = 8, 128  # a tile's words: row (half, warp), column (lane, word)
MIDDLE = 8  # what a nibble counts from: its value as an operand is its number minus this


def pack(q: jax.Array) -> jax.Array:
    """``[F, D/2]`` uint8, element 2i of a row in the low nibble of byte i -> ``[F/64, D/128, 8, 128]`` int32.

    Word ``(4 h + w, 16 r + 4 s + j)`` has at bit ``16 b + 4 t`` row ``16 w + 8 h + r``, column
    ``32 j + 8 t + 2 s + b``.
    """
    f, half = q.shape
    byte = q.reshape(f // ROWS, 4, 2, 8, half // 64, 4, 4, 4).astype(jnp.uint32)  # [FB, w, h, r, KB, j, t, s]
    pair = (byte & 15) | ((byte >> 4) << 16)
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint32)[:, None]
    word = jnp.sum(pair << shifts, axis=6, dtype=jnp.uint32)  # [FB, w, h, r, KB, j, s]
    word = word.transpose(0, 4, 2, 1, 3, 6, 5).reshape(f // ROWS, half // 64, WORD_ROWS, WORD_COLUMNS)
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def unpack(words: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """``[..., 8, 128]`` int32 -> ``[..., 64, 128]``: each nibble's number minus 8, the inverse of ``pack``."""
    lead = words.shape[:-2]
    shape = (*lead, 2, 4, 8, 4, 4, 4, 2)  # [..., h, w, r, s, j, t, b]
    t, b = (jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - i) for i in (2, 1))
    nibble = (words.reshape(*shape[:-2], 1, 1) >> (4 * t + 16 * b)) & 15
    n = len(lead)
    order = [n + 1, n, n + 2, n + 4, n + 5, n + 3, n + 6]  # w, h, r, j, t, s, b
    nibble = nibble.transpose(*range(n), *order).reshape(*lead, ROWS, COLUMNS)
    return (nibble - MIDDLE).astype(dtype)


def operands(words_ref: Any, group: int, interpret: Any) -> list[Any]:
    """A tile's words in shared memory -> its groups as left operands, ``[64, group]`` bfloat16 each.

    The interpreter gets the same from ``unpack``: it has no inline code.
    """
    if interpret:
        tile = unpack(words_ref[...])
        return [tile[:, g : g + group] for g in range(0, COLUMNS, group)]
    layout = plgpu.Layout.WG_STRIDED((WORD_ROWS, WORD_COLUMNS), vec_size=4)
    words = plgpu.load(words_ref, layout=layout)
    shape = plgpu.ShapeDtypeStruct((ROWS, group), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=[shape] * (COLUMNS // group))
    def take_out(_, words):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty((COLUMNS // 8, 2), dtype=object)  # of 8 columns and half of the rows
        for half, four in enumerate(words.registers.flat):
            for j in range(4):
                word = vector.extract(four, [], [j])
                for t in range(4):
                    shifted = arith.shrui(word, mosaic.c(4 * t, i32)) if t else word
                    registers[4 * j + t, half] = _pair(shifted)
        outs = []
        for columns in np.split(registers, COLUMNS // group):
            regs = columns.reshape(fragmented_array.WGMMA_LAYOUT.registers_shape((ROWS, group)))
            outs.append(
                fragmented_array.FragmentedArray(
                    _registers=regs, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
                )
            )
        return outs

    return take_out(words)


def _pair(word: Any) -> Any:
    """The nibbles at bits 0 and 16 as two bfloat16, less 8. A nibble or-ed into the mantissa of 128 is 128 + nibble."""
    i32 = ir.IntegerType.get_signless(32)
    code = (
        "{ .reg .b32 t; lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; "  # (word & mask) | 128, 128
        "sub.rn.bf16x2 $0, t, $2; }"
    )
    middle = mosaic.c(0x43084308, i32)  # 136, 136
    pair = llvm.inline_asm(i32, [word, middle], code, "=r,r,r")
    return mosaic.utils.bitcast(pair, ir.VectorType.get((2,), ir.BF16Type.get()))
