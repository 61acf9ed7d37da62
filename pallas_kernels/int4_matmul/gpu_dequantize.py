"""A packed matrix -> bfloat16 on Mosaic GPU (Hopper), at the speed of writing it: what a product of many tokens reads.

A program is one warpgroup with 64 features and some tiles of inputs. It reads a tile's words and scales straight into
registers, one tile ahead, in the order in which they are packed, and the copy engine writes the rows; several programs
on a multiprocessor hide each other's waits.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.int4_matmul import gpu_unpack
from pallas_kernels.int4_matmul.gpu_unpack import COLUMNS, ROWS
from pallas_kernels.mosaic import pl, plgpu

_TILES = 8  # of a program, at most


def dequantize(
    weights: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    origin: jax.Array | None,
    row_scale: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """``row_scale * (scale * q + bias)``, or with an origin; arguments as of ``gpu_stream.multiply``, weights repacked.

    Returns:
        ``[F, D]`` bfloat16.
    """
    row_blocks, steps, _, _ = weights.shape
    groups = 1 if scale is None else scale.shape[1] // steps
    group = COLUMNS // groups
    tiles = max(n for n in range(1, _TILES + 1) if steps % n == 0)
    per_group = [a for a in (scale, bias, origin) if a is not None]
    swizzled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def kernel(
        w_ref,  # [F/64, D/128, 2 bits, 128]
        *refs,  # scale, bias and origin [F/64, D/G, 64], if there are such; row_scale_ref [F]; out_ref [F, D]
        o_smem,  # [2, 64, 128]
    ):
        *group_refs, row_scale_ref, out_ref = refs
        origin_ref = None if origin is None else group_refs.pop()
        block, first = lax.axis_index("block"), lax.axis_index("part") * tiles

        def load_vector(ref):
            return plgpu.load(ref, layout=row_layout, optimized=False)

        def load_tile(step):
            places = [(block, step * groups + g) for g in range(groups)]
            origins = None if origin_ref is None else [load_vector(origin_ref.at[p]) for p in places]
            factors = [[load_vector(ref.at[p]).astype(jnp.float32) for ref in group_refs] for p in places]
            return gpu_unpack.load_words(w_ref.at[block, step]), origins, factors

        per_row = load_vector(row_scale_ref.at[pl.ds(block * ROWS, ROWS)])

        def write_tile(i, carry):
            words, origins, factors = carry
            following = load_tile(jnp.minimum(first + i + 1, steps - 1))
            buffer = lax.rem(i, jnp.int32(2))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for g, numbers in enumerate(gpu_unpack.operands(words, group, interpret, origins)):
                value = numbers.astype(jnp.float32)
                for factor, combine in zip(factors[g], (jnp.multiply, jnp.add)):
                    value = combine(value, lax.broadcast_in_dim(factor, value.shape, [0]))
                value = value * lax.broadcast_in_dim(per_row, value.shape, [0])
                o_smem[buffer, :, pl.ds(g * group, group)] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            place = pl.ds(block * ROWS, ROWS), pl.ds((first + i) * COLUMNS, COLUMNS)
            plgpu.copy_smem_to_gmem(o_smem.at[buffer], out_ref.at[place])
            return following

        lax.fori_loop(jnp.int32(0), jnp.int32(tiles), write_tile, load_tile(first))
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((row_blocks * ROWS, steps * COLUMNS), jnp.bfloat16),
        grid=(row_blocks, steps // tiles),
        grid_names=("block", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=dict(o_smem=plgpu.SMEM((2, ROWS, COLUMNS), jnp.bfloat16, transforms=swizzled)),
        interpret=interpret,
    )(weights, *per_group, row_scale)
