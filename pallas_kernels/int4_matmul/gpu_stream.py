"""The product of few tokens with a packed int4 matrix on Mosaic GPU (Hopper), at the speed of reading the matrix.

The transposed product ``w @ x.T`` is computed: 64 output features are the rows of a matrix instruction, the tokens its
columns. All tiles of the matrix (a block of features by 128 inputs, or 256) lie on one line, block after block, and
each multiprocessor takes an equal stretch of it (the stream-K decomposition of Osama et al., 2023), so every one reads
the same number of bytes whatever the matrix' shape. One warpgroup keeps a ring of shared memory filled by TMA, four
multiply: of 16 tokens or fewer two have the same features and a half of a tile's inputs each, of more each has its own
features, so that a tile of x serves 256 of them. A warpgroup turns its nibbles into bfloat16 in registers, exactly, and
the scale of a group multiplies the group's sums in float32. Where a stretch ends inside a block the pieces are added by
XLA, in one fusion with what follows. If there are so many blocks that whole ones keep nearly all multiprocessors busy,
none is cut, and the kernel writes the product itself.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.int4_matmul import gpu_unpack
from pallas_kernels.int4_matmul.gpu_unpack import COLUMNS, ROWS
from pallas_kernels.mosaic import pl, plgpu

BLOCK_TOKENS = 64  # columns of a product at most: more tokens are more blocks on the line
FEW_TOKENS = 16  # up to these, two warpgroups share features and divide the inputs
_CONSUMERS = 4
_SMEM_BYTES = 220 * 1024  # of 227 KiB; the rest is for barriers and alignment
_MAX_RING = 24


_LOADING_REGISTERS = 24


def multiplying_registers(warpgroups: int) -> int:
    """The registers of a thread that multiplies, of so many warpgroups beside one that loads.

    A block starts with as many as the compiler gives each thread, a multiple of 8, and no more can be had: a warpgroup
    that asks for more waits for ever.
    """
    launched = 65536 // (128 * (warpgroups + 1)) // 8 * 8
    return (launched * (warpgroups + 1) - _LOADING_REGISTERS) // warpgroups // 8 * 8


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may differ without changing the result beyond rounding."""

    ring: int | None = None  # tiles in shared memory; None: as many as fit
    num_sms: int = 132  # multiprocessors of an H100 or H200
    move_registers: bool = True  # from the loading warpgroup to those that multiply
    launch_early: bool = False  # programmatic dependent launch: weights are read while the kernel before ends
    busy: float = 0.8  # the share of multiprocessors from which on blocks stay whole
    many_tokens: int = 512  # with more the matrix is dequantized and XLA multiplies
    xla_dequantizes: bool = False  # instead of a kernel


@dataclasses.dataclass(frozen=True)
class Split:
    """How a product is cut: static, from its shape alone."""

    tokens: int  # columns of a product
    across: int  # warpgroups side by side along the features
    along: int  # warpgroups that divide the inputs of a tile, 128 each
    token_blocks: int
    blocks: int  # of features times tokens
    steps: int  # tiles of a block
    stretch: int  # tiles of a multiprocessor

    @property
    def pieces(self) -> int:
        """The most pieces that a block is cut into."""
        return int(self.counts().max())

    def counts(self) -> np.ndarray:
        """``[blocks]``: the pieces of each."""
        ends = np.arange(1, self.blocks + 1) * self.steps
        return (ends - 1) // self.stretch - (ends - self.steps) // self.stretch + 1


def split_of(num_tokens: int, row_blocks: int, steps: int, t: Tuning) -> Split:
    """For ``num_tokens`` by ``row_blocks`` (even) times 64 features by ``steps`` times 128 inputs."""
    tokens = min(-(-num_tokens // 8) * 8, BLOCK_TOKENS)
    along = 2 if tokens <= FEW_TOKENS and steps % 2 == 0 else 1
    across = 2 if along == 2 or row_blocks % _CONSUMERS else _CONSUMERS
    steps //= along
    token_blocks = -(-num_tokens // tokens)
    blocks = row_blocks // across * token_blocks
    rounds = -(-blocks // t.num_sms)
    stretch = rounds * steps if blocks >= t.busy * rounds * t.num_sms else -(-blocks * steps // t.num_sms)
    return Split(tokens, across, along, token_blocks, blocks, steps, stretch)


def aligned_rows(rows: int, row_bytes: int) -> int:
    """``rows`` or more, a multiple of 128 bytes together: the copy engine puts what it reads at such places in shared
    memory, and faults elsewhere."""
    multiple = 128 // math.gcd(128, row_bytes)
    return -(-rows // multiple) * multiple


def add_pieces(pieces: jax.Array, split: Split, out_dtype: Any) -> jax.Array:
    """``[P, 2, MB tokens, F]`` bfloat16, values and what rounding left over of them -> ``[MB tokens, F]``. Places that
    ``Split.counts`` does not name were not written and are left out."""
    features = split.blocks // split.token_blocks
    written = np.arange(split.pieces)[:, None] < split.counts()  # [P, blocks]
    written = written.reshape(split.pieces, features, split.token_blocks).transpose(0, 2, 1)[:, :, None, :, None]
    halves = pieces.reshape(split.pieces, 2, split.token_blocks, split.tokens, features, -1).astype(jnp.float32)
    values = halves[:, 0] + halves[:, 1]
    total = sum(x if w.all() else jnp.where(w, x, 0) for w, x in zip(written, values, strict=True))
    return jnp.reshape(total, pieces.shape[2:]).astype(out_dtype)


@functools.partial(jax.jit, static_argnames=("split", "out_dtype", "t", "interpret"))
def multiply(
    x: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    origin: jax.Array | None,
    row_scale: jax.Array,
    *,
    split: Split,
    out_dtype: Any,
    t: Tuning,
    interpret: Any = None,
) -> jax.Array:
    """``x @ (row_scale * (scale * q + bias)).T``, q from -8 to 7, or of 8 bits from -128 to 127; or with an origin
    ``x @ (row_scale * scale * (q + MIDDLE + ORIGIN - origin)).T``.

    Args:
        x: ``[MB, tokens, D]`` bfloat16.
        weights: ``[F/64, D/128, 2 bits, 128]`` int32 of ``gpu_unpack.pack``, or ``[F, D]`` int4 with groups of 128.
        scale, bias: ``[F/64, D/G, 64]`` float16; G is 32, 64 or 128. Or None, for ones and zeros.
        origin: as scale, bfloat16 (``gpu_unpack.operands``), of repacked weights without a bias; or None.
        row_scale: ``[F]`` float32.

    Returns:
        ``[MB tokens, F]`` in ``out_dtype``; of float32 17 bits are kept.
    """
    token_blocks, tokens, d = x.shape
    across, along, steps, stretch = split.across, split.along, split.steps, split.stretch
    total, whole = split.blocks * steps, split.pieces == 1 and out_dtype == x.dtype
    halves = 1 if whole else 2  # of an output: a piece keeps what rounding leaves over
    group = COLUMNS if scale is None else d // scale.shape[1]
    groups = COLUMNS // group  # of a warpgroup's part of a tile
    # Registers decide how many groups' sums are kept together, and whether factors are read while products are made.
    at_once = max(1, min(groups, (BLOCK_TOKENS if bias is None else BLOCK_TOKENS // 2) // tokens))
    read_late = tokens > (48 if bias is None else FEW_TOKENS)
    repacked = weights.dtype == jnp.int32
    sums = None
    sum_rows = aligned_rows(along * groups, 4 * tokens)
    if bias is not None:  # of the inputs of a group: [MB, D/G, tokens]
        by_group = x.reshape(token_blocks, tokens, -1, group).transpose(0, 2, 1, 3)
        sums = jnp.sum(by_group, axis=3, dtype=jnp.float32)
    per_group = {n: a for n, a in (("scale", scale), ("bias", bias), ("origin", origin)) if a is not None}
    operands = [x, weights, *per_group.values(), *(() if sums is None else (sums,)), row_scale]

    columns = min(64, group)  # a slice of the inputs is a number of whole swizzled tiles
    x_tiles = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    width = along * COLUMNS  # of a tile
    w_shape = (across, along, *weights.shape[2:]) if repacked else (across * ROWS, width)
    w_tiles = () if repacked else (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(COLUMNS // 2))
    bits = gpu_unpack.bits_of(weights.shape[2]) if repacked else 4
    tile_bytes = across * ROWS * width * bits // 8 + 2 * tokens * width
    tile_bytes += 2 * across * ROWS * along * groups * len(per_group) + (0 if sums is None else 4 * sum_rows * tokens)
    out_bytes = across * ROWS * tokens * (2 * halves + (4 if along > 1 else 0))
    ring = t.ring or min(_MAX_RING, (_SMEM_BYTES - out_bytes) // tile_bytes)
    o_tiles = (plgpu.TilingTransform((8, ROWS)), plgpu.SwizzleTransform(128))
    row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def kernel(
        x_ref,  # [MB, tokens, D]
        w_ref,  # [F/64, D/128, 2 bits, 128], or [F, D]
        *refs,  # of ``per_group`` [F/64, D/G, 64], sums_ref [MB, D/G, tokens], if there are such; row_scale_ref [F];
        # out_ref [1, MB tokens, F], or of pieces [P, 2, MB tokens, F]
        x_smem,  # [ring, tokens, 128 along]
        w_smem,  # [ring, across, along, 2 bits, 128], or [ring, 64 across, 128 along]
        o_smem,  # [across, halves, tokens, 64]
        full,  # [ring]
        free,  # [ring]
        given,  # [across]
        taken,  # [across]
        other_smem: Any = None,  # [across, 64, tokens]
        sums_smem: Any = None,  # [ring, along * groups or more, tokens]
        **group_smem: Any,  # of each of ``per_group`` [ring, across, along * groups, 64]
    ):
        *group_refs, row_scale_ref, out_ref = refs
        sums_ref = None if sums is None else group_refs.pop()
        warpgroup, sm = lax.axis_index("warpgroup"), lax.axis_index("sm")
        start = jnp.minimum(sm * stretch, total)
        count = jnp.minimum(start + stretch, total) - start  # tiles of this stretch

        @pl.when(warpgroup == along * across)
        def _load():
            if t.move_registers:
                plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")

            def place_of(entry):
                """(slot, step, features, tokens) of an entry of the stretch."""
                position = start + entry
                block = lax.div(position, jnp.int32(steps))
                return (
                    lax.rem(entry, jnp.int32(ring)),
                    lax.rem(position, jnp.int32(steps)),
                    lax.div(block, jnp.int32(token_blocks)),
                    lax.rem(block, jnp.int32(token_blocks)),
                )

            def load_weights(entry):
                slot, step, features, _ = place_of(entry)
                rows, cut = pl.ds(features * across, across), pl.ds(step * (along * groups), along * groups)
                if repacked:
                    plgpu.copy_gmem_to_smem(w_ref.at[rows, pl.ds(step * along, along)], w_smem.at[slot], full.at[slot])
                else:
                    whole = pl.ds(features * (across * ROWS), across * ROWS), pl.ds(step * width, width)
                    plgpu.copy_gmem_to_smem(w_ref.at[whole], w_smem.at[slot], full.at[slot])
                for ref, name in zip(group_refs, per_group, strict=True):
                    plgpu.copy_gmem_to_smem(ref.at[rows, cut], group_smem[name].at[slot], full.at[slot])

            def load_tokens(entry):
                slot, step, _, token_block = place_of(entry)
                inputs = x_ref.at[token_block, :, pl.ds(step * width, width)]
                plgpu.copy_gmem_to_smem(inputs, x_smem.at[slot], full.at[slot])
                if sums_ref is not None:
                    cut = pl.ds(step * (along * groups), along * groups)
                    target = sums_smem.at[slot, pl.ds(0, along * groups)]
                    plgpu.copy_gmem_to_smem(sums_ref.at[token_block, cut], target, full.at[slot])

            first = jnp.minimum(count, ring)
            if t.launch_early:
                pl.loop(jnp.int32(0), first)(load_weights)  # they do not depend on what ran before
                plgpu.griddepcontrol_wait()
                plgpu.griddepcontrol_launch_dependents()
                pl.loop(jnp.int32(0), first)(load_tokens)

            @pl.loop(first if t.launch_early else jnp.int32(0), count)
            def _(entry):
                @pl.when(entry >= ring)
                def _():
                    plgpu.barrier_wait(free.at[lax.rem(entry, jnp.int32(ring))])

                load_weights(entry)
                load_tokens(entry)

            @pl.loop(jnp.maximum(count - ring, 0), count)
            def _(entry):  # who waits on a barrier at all must see each of its phases
                plgpu.barrier_wait(free.at[lax.rem(entry, jnp.int32(ring))])

        @pl.when((warpgroup < along * across) & (count > 0))
        def _compute():
            if t.move_registers:
                plgpu.set_max_registers(multiplying_registers(along * across), action="increase")
            if t.launch_early:  # what ran before may still read what this writes
                plgpu.griddepcontrol_wait()
            rows = lax.rem(warpgroup, jnp.int32(across))
            section = lax.div(warpgroup, jnp.int32(across))
            first_block = lax.div(start, jnp.int32(steps))
            num_pieces = lax.div(start + count - 1, jnp.int32(steps)) - first_block + 1

            def operands_of(slot):
                """The tile's groups as left operands."""
                if repacked:
                    words = gpu_unpack.load_words(w_smem.at[slot, rows, section])
                    origins = None if origin is None else [of_group("origin", slot, g) for g in range(groups)]
                    return gpu_unpack.operands(words, group, interpret, origins)
                tile = w_smem.at[slot, pl.ds(rows * ROWS, ROWS), pl.ds(section * COLUMNS, COLUMNS)]
                w = plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_4X)
                return [plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(x.dtype)]

            def add_tile(slot, acc):
                left = operands_of(slot)
                for begin in range(0, groups, at_once):
                    some = range(begin, begin + at_once)

                    def products(*refs, some=some):
                        for g, ref in zip(some, refs, strict=True):
                            right = x_smem.at[slot, :, pl.ds(section * COLUMNS + g * group, group)].transpose((1, 0))
                            plgpu.wgmma(ref, left[g], right)
                        factors = None if read_late else read_factors(slot, some)
                        return [ref[...] for ref in refs], factors

                    parts, factors = pl.run_scoped(products, *[plgpu.ACC((ROWS, tokens), jnp.float32)] * at_once)
                    factors = factors or read_factors(slot, some)
                    for part, (s, b, sum_of_x) in zip(parts, factors, strict=True):
                        acc = acc + (part if s is None else part * lax.broadcast_in_dim(s, part.shape, [0]))
                        if b is not None:
                            b = lax.broadcast_in_dim(b, part.shape, [0])
                            acc = acc + b * lax.broadcast_in_dim(sum_of_x, part.shape, [1])
                return acc

            def read_factors(slot, some):
                factors = [factors_of(slot, g) for g in some]
                if some.stop == groups:
                    plgpu.commit_smem()  # the copy engine may write where all this was read from
                return factors

            def factors_of(slot, g) -> tuple[Any, Any, Any]:
                """A group's scales [64] and biases [64] and the sums of its inputs [tokens], if there are any."""
                if scale is None:
                    return None, None, None
                s = of_group("scale", slot, g).astype(jnp.float32)
                if bias is None:
                    return s, None, None
                b = of_group("bias", slot, g).astype(jnp.float32)
                return s, b, plgpu.load(sums_smem.at[slot, section * groups + g], layout=column_layout)

            def of_group(name, slot, g):
                return plgpu.load(group_smem[name].at[slot, rows, section * groups + g], layout=row_layout)

            @pl.loop(jnp.int32(0), num_pieces)
            def _(j):
                block = first_block + j
                begin = jnp.maximum(block * steps, start) - start
                end = jnp.minimum((block + 1) * steps, start + count) - start

                def add_entry(entry, acc):
                    slot = lax.rem(entry, jnp.int32(ring))
                    plgpu.barrier_wait(full.at[slot])
                    acc = add_tile(slot, acc)
                    plgpu.barrier_arrive(free.at[slot])
                    return acc

                zeros = plgpu.layout_cast(jnp.zeros((ROWS, tokens), jnp.float32), plgpu.Layout.WGMMA)
                acc = lax.fori_loop(begin, end, add_entry, zeros)

                def write(acc):
                    token_block = lax.rem(block, jnp.int32(token_blocks))
                    columns = pl.ds((lax.div(block, jnp.int32(token_blocks)) * across + rows) * ROWS, ROWS)
                    factor = plgpu.load(row_scale_ref.at[columns], layout=row_layout, optimized=False)
                    acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
                    target = out_ref if whole else out_ref.at[sm - lax.div(block * steps, jnp.int32(stretch))]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for half in range(halves):
                        rounded = acc.astype(x.dtype)
                        o_smem.at[rows, half].transpose((1, 0))[...] = rounded
                        acc = acc - rounded.astype(jnp.float32)
                    plgpu.commit_smem()
                    for half in range(halves):
                        place = target.at[half, pl.ds(token_block * tokens, tokens), columns]
                        plgpu.copy_smem_to_gmem(o_smem.at[rows, half], place)

                if along == 1:
                    write(acc)
                else:

                    @pl.when(section == 1)
                    def _():
                        other_smem[rows] = acc
                        plgpu.barrier_arrive(given.at[rows])
                        plgpu.barrier_wait(taken.at[rows])

                    @pl.when(section == 0)
                    def _():
                        plgpu.barrier_wait(given.at[rows])
                        other = plgpu.load(other_smem.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
                        plgpu.barrier_arrive(taken.at[rows])
                        write(acc + other)

            plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = dict(
        x_smem=plgpu.SMEM((ring, tokens, width), x.dtype, transforms=x_tiles),
        w_smem=plgpu.SMEM((ring, *w_shape), weights.dtype, transforms=w_tiles),
        o_smem=plgpu.SMEM((across, halves, tokens, ROWS), x.dtype, transforms=o_tiles),
        full=plgpu.Barrier(num_arrivals=len(operands) - 1, num_barriers=ring),
        free=plgpu.Barrier(num_arrivals=along * across, num_barriers=ring),
        given=plgpu.Barrier(num_barriers=across),
        taken=plgpu.Barrier(num_barriers=across),
    )
    if along > 1:
        scratch["other_smem"] = plgpu.SMEM((across, ROWS, tokens), jnp.float32)
    scratch |= {n: plgpu.SMEM((ring, across, along * groups, ROWS), a.dtype) for n, a in per_group.items()}
    if sums is not None:
        scratch["sums_smem"] = plgpu.SMEM((ring, sum_rows, tokens), jnp.float32)
    shape = (token_blocks * tokens, weights.shape[0] * (ROWS if repacked else 1))
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((halves, *shape) if whole else (split.pieces, halves, *shape), x.dtype),
        grid=(t.num_sms,),
        grid_names=("sm",),
        num_threads=along * across + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=scratch,
        interpret=interpret,
    )(*operands)
    return out[0] if whole else add_pieces(out, split, out_dtype)
