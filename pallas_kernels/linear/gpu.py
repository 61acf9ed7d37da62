"""Products of few tokens with a large bfloat16 matrix on Mosaic GPU (Hopper), at the speed of reading the matrix.

The transposed product ``w @ x.T`` is computed: 64 output features are the rows of a matrix instruction, the tokens its
columns, so that few tokens waste nothing. All tiles of ``w`` (``BLOCK_N`` features by ``block_k``) lie on one line,
feature block after feature block, and each multiprocessor takes an equal stretch of that line (the stream-K
decomposition of Osama et al., 2023), so every one reads the same number of bytes whatever the matrix' shape. One
warpgroup keeps a ring of shared memory filled by TMA, two multiply, each 64 features. Where a stretch ends inside a
feature block the pieces are added by XLA, in one fusion with what follows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # much of it has no types that a checker can follow

_ROWS = 64  # of one warpgroup's matrix product
_CONSUMERS = 2
BLOCK_N = _ROWS * _CONSUMERS
MAX_TOKENS = 128  # beyond, x takes the memory that keeps reads of w in flight, and XLA's products are better
_SMEM_BYTES = 224 * 1024  # of 227 KiB; the rest is for barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ without changing the result beyond rounding."""

    block_k: int = 128
    ring: int | None = None  # tiles of w (and of x) in shared memory; None: as many as fit
    num_sms: int = 132  # multiprocessors of an H100 or H200

    def ring_for(self, m: int) -> int:
        """Tiles in shared memory beside the f32 outputs, for ``m`` columns."""
        return self.ring or (_SMEM_BYTES - BLOCK_N * m * 4) // (self.block_k * (BLOCK_N + m) * 2)


def refusal(num_tokens: int, n: int, k: int, dtype: Any, t: Tuning | None = None) -> str | None:
    """Why ``linear`` does not take these shapes; None if it does."""
    t = t or Tuning()
    if n % BLOCK_N or k % t.block_k:
        return f"w is [{n}, {k}]; it must divide into tiles of {BLOCK_N} by {t.block_k}"
    if num_tokens > MAX_TOKENS:
        return f"{num_tokens} tokens are more than {MAX_TOKENS}"
    if dtype != jnp.bfloat16:
        return f"dtype is {dtype}, not bfloat16"
    return None


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def linear(x: jax.Array, w: jax.Array, *, tuning: Tuning | None = None, interpret: Any = None) -> jax.Array:
    """``x @ w.T`` accumulated in f32.

    Args:
        x: ``[T, K]`` bfloat16, T at most ``MAX_TOKENS``.
        w: ``[N, K]`` bfloat16; N is a multiple of 128, K of the tile.
        tuning: None takes the defaults.
        interpret: ``plgpu.InterpretGPUParams`` runs on a CPU.

    Returns:
        ``[T, N]`` float32.
    """
    t = tuning or Tuning()
    num_tokens, k = x.shape
    n = w.shape[0]
    if why := refusal(num_tokens, n, k, x.dtype, t):
        raise ValueError(why)
    m = -(-num_tokens // 8) * 8  # columns of the matrix instruction
    x = jnp.pad(x, ((0, m - num_tokens), (0, 0)))
    pieces = _pieces(x, w, t, interpret)  # [NB + S, 128, M]
    slots = piece_slots(n // BLOCK_N, k // t.block_k, t.num_sms)  # [NB, P], -1: none
    found = pieces[np.maximum(slots, 0)]  # [NB, P, 128, M]
    out = jnp.sum(jnp.where((slots >= 0)[:, :, None, None], found, 0), axis=1)  # [NB, 128, M]
    return out.reshape(n, m).T[:num_tokens]


def share(num_blocks: int, num_steps: int, num_sms: int) -> int:
    """Tiles of a multiprocessor's stretch."""
    return -(-num_blocks * num_steps // num_sms)


def piece_slots(num_blocks: int, num_steps: int, num_sms: int) -> np.ndarray:
    """``[NB, P]``: where the pieces of each feature block are, -1 behind its last. Piece ``block + s`` is what
    multiprocessor ``s`` has of ``block``: both grow along the line, so no two pieces share a place."""
    stretch = share(num_blocks, num_steps, num_sms)
    first = np.arange(num_blocks) * num_steps // stretch  # [NB]
    last = (np.arange(1, num_blocks + 1) * num_steps - 1) // stretch  # [NB]
    s = first[:, None] + np.arange((last - first).max() + 1)  # [NB, P]
    return np.where(s <= last[:, None], s + np.arange(num_blocks)[:, None], -1)


def _pieces(x: jax.Array, w: jax.Array, t: Tuning, interpret: Any) -> jax.Array:
    """x [M, K], w [N, K] -> pieces [NB + S, 128, M] f32; places that ``piece_slots`` does not name are not written."""
    m, k = x.shape
    n, block_k, ring = w.shape[0], t.block_k, t.ring_for(m)
    num_blocks, num_steps = n // BLOCK_N, k // block_k
    stretch, total = share(num_blocks, num_steps, t.num_sms), num_blocks * num_steps
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def kernel(
        x_ref,  # [M, K]
        w_ref,  # [N, K]
        pieces_ref,  # [NB + S, 128, M]
        *,
        x_smem,  # [ring, M, block_k]
        w_smem,  # [ring, 128, block_k]
        o_smem,  # [2, 64, M]
        full,  # [ring]
        free,  # [ring]
    ):
        warpgroup, sm = lax.axis_index("warpgroup"), lax.axis_index("sm")
        start = jnp.minimum(sm * stretch, total)
        count = jnp.minimum(start + stretch, total) - start  # tiles of this stretch

        @pl.when(warpgroup == _CONSUMERS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(jnp.int32(0), count)
            def _(entry):
                slot = lax.rem(entry, jnp.int32(ring))
                block = lax.div(start + entry, jnp.int32(num_steps))
                step = lax.rem(start + entry, jnp.int32(num_steps))

                @pl.when(entry >= ring)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                columns = pl.ds(step * block_k, block_k)
                plgpu.copy_gmem_to_smem(
                    w_ref.at[pl.ds(block * BLOCK_N, BLOCK_N), columns], w_smem.at[slot], full.at[slot]
                )
                plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_smem.at[slot], full.at[slot])

            @pl.loop(jnp.maximum(count - ring, 0), count)
            def _(entry):  # who waits on a barrier at all must see each of its phases
                plgpu.barrier_wait(free.at[lax.rem(entry, jnp.int32(ring))])

        @pl.when((warpgroup < _CONSUMERS) & (count > 0))
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            first_block = lax.div(start, jnp.int32(num_steps))
            num_pieces = lax.div(start + count - 1, jnp.int32(num_steps)) - first_block + 1

            @pl.loop(jnp.int32(0), num_pieces)
            def _(j):
                block = first_block + j
                begin = jnp.maximum(block * num_steps, start) - start
                end = jnp.minimum((block + 1) * num_steps, start + count) - start

                def accumulate(acc_ref):
                    @pl.loop(begin, end)
                    def _(entry):
                        slot = lax.rem(entry, jnp.int32(ring))
                        plgpu.barrier_wait(full.at[slot])
                        rows = w_smem.at[slot, pl.ds(warpgroup * _ROWS, _ROWS)]
                        plgpu.wgmma(acc_ref, rows, x_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])

                    return acc_ref[...]

                acc = pl.run_scoped(accumulate, plgpu.ACC((_ROWS, m), jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[warpgroup] = acc
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    o_smem.at[warpgroup], pieces_ref.at[block + sm, pl.ds(warpgroup * _ROWS, _ROWS)]
                )

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_blocks + t.num_sms, BLOCK_N, m), jnp.float32),
        grid=(t.num_sms,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=dict(
            x_smem=plgpu.SMEM((ring, m, block_k), x.dtype, transforms=tiled),
            w_smem=plgpu.SMEM((ring, BLOCK_N, block_k), w.dtype, transforms=tiled),
            o_smem=plgpu.SMEM((_CONSUMERS, _ROWS, m), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=ring),
            free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=ring),
        ),
        interpret=interpret,
    )(x, w)
