"""Tiles of an int8 or fp8 (e4m3) cache on Mosaic GPU: numbers and scales in registers, and sums over the keys."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import arith, fragmented_array, ir, memref, mosaic, plgpu, vector

KEYS = 64  # of a tile: rows of a warpgroup's matrix instruction


def layout_of_columns() -> Any:
    return plgpu.Layout.WGMMA.reduce(0)


def over_keys(x: Any, op: str, scratch: Any, interpret: Any) -> Any:
    """``x`` [64, QR] f32 -> [QR], its "max" or "add" over all warps, by way of ``scratch``: 1 KiB of f32."""
    if interpret:  # it has no inline code
        return x.max(axis=0) if op == "max" else x.sum(axis=0)
    out = plgpu.ShapeDtypeStruct((x.shape[1],), jnp.float32, layout=layout_of_columns())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=out)
    def reduce(_, x, scratch):
        return x.reduce(op, 0, scratch)

    return reduce(x, scratch)


def numbers_as_bf16(x: Any) -> Any:
    """Int8 or e4m3 as bfloat16, exactly."""
    # There is no instruction from e4m3 to it, but one to float16.
    return (x.astype(jnp.float16) if x.dtype == jnp.float8_e4m3fn else x).astype(jnp.bfloat16)


def scales_of_rows(ref: Any, layout: Any, interpret: Any) -> Any:
    """The scales of 64 keys, ``ref`` [pages, 64 / pages] bf16 in shared memory with gaps between pages, as [64] where a
    thread has those of its rows; ``layout`` (WGMMA, or the one that is read to become it) of what they multiply."""
    rows = ref.shape[1]
    if interpret:
        return ref[...].reshape(KEYS)
    out = plgpu.ShapeDtypeStruct((KEYS,), jnp.bfloat16, layout=layout.reduce(1))
    row_layout = layout.reduce(1).to_mgpu()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=out)
    def load(_, ref):
        index = ir.IndexType.get()
        thread = arith.remui(arith.index_cast(index, mosaic.utils.thread_idx()), mosaic.c(128, index))
        # Of a warp's 16 rows a thread has the one of its lane / 4, and the one 8 further.
        warp, lane = arith.divui(thread, mosaic.c(32, index)), arith.remui(thread, mosaic.c(32, index))
        first = arith.addi(arith.muli(warp, mosaic.c(16, index)), arith.divui(lane, mosaic.c(4, index)))
        registers = np.empty(2, dtype=object)
        for i in range(2):
            row = arith.addi(first, mosaic.c(8 * i, index))
            place = arith.divui(row, mosaic.c(rows, index)), arith.remui(row, mosaic.c(rows, index))
            value = memref.load(ref, list(place))
            registers[i] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
        return fragmented_array.FragmentedArray(
            _registers=registers.reshape(row_layout.registers_shape((KEYS,))), _layout=row_layout, _is_signed=None
        )

    return load(ref)
