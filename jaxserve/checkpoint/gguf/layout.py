"""Where every canonical parameter lies in the tensors of a GGUF file.

Shapes are those of ``model.params.param_specs``, written down again because a checkpoint is opened, checked and shown
without jax; a test compares the two for every family.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from jaxserve.checkpoint.gguf.families import TOP_TENSORS, UNSTACKED_EXPERTS, GGUFFamily
from jaxserve.config import ModelConfig

Shape = tuple[int, ...]
LATENT = ("q_down", "q_down_norm", "q_up", "kv_down", "kv_down_norm", "k_up", "v_up")


class Piece(NamedTuple):
    """A box of a parameter that one tensor holds.

    Elements follow each other in both alike, from element 0 of row ``first_row`` of the tensor (of a vector: from
    element ``first_row``), but for what the last three fields say.
    """

    tensor: str
    tensor_shape: Shape
    start: Shape  # of the box, in the parameter
    shape: Shape  # of the box
    first_row: int = 0
    interleaved_axis: int | None = None  # the axis of H, where the tensor has rotary pairs side by side
    rows_apart: int | None = None  # of two indices of the first of three axes, where other rows lie between
    is_transposed: bool = False  # the last two axes are the other way round in the tensor


def param_shape(pieces: tuple[Piece, ...]) -> Shape:
    """The shape of the parameter that these pieces fill."""
    return tuple(max(ends) for ends in zip(*(tuple(map(sum, zip(p.start, p.shape))) for p in pieces)))


def layout(
    family: GGUFFamily, config: ModelConfig, tensors: Collection[str]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """(parameter, pieces) of every parameter of ``config``; ``tensors`` are the names in the file.

    Lazy: a corrupt layer count must not cost memory before the first missing tensor is found.
    """
    d, v = config.hidden_size, config.vocab_size
    yield "embed", _whole(TOP_TENSORS["embed"], (v, d))
    if config.learned_positions:
        yield "positions", _whole(TOP_TENSORS["positions"], (config.max_position_embeddings, d))
    for i in range(config.num_layers):
        for parameter, pieces in _layer(family, config, i, tensors):
            yield f"layers.{i}.{parameter}", pieces
    yield "final_norm", _whole(TOP_TENSORS["final_norm"], (d,))
    if config.norm == "layer":
        yield "final_norm_bias", _whole(TOP_TENSORS["final_norm_bias"], (d,))
    if not config.tie_word_embeddings:
        yield "head", _whole(TOP_TENSORS["head"], (v, d))


def _layer(
    family: GGUFFamily, config: ModelConfig, layer: int, tensors: Collection[str]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    d, h, k = config.hidden_size, config.head_dim, config.num_kv_heads
    group, moe = config.num_heads // k, config.moe
    has_bias = config.norm == "layer"

    def names(parameter: str) -> tuple[str, ...]:
        return tuple(f"blk.{layer}.{name}" for name in family.layer_tensors(parameter))

    def whole(parameter: str, shape: Shape, tensor_shape: Shape | None = None) -> tuple[str, tuple[Piece, ...]]:
        return parameter, _whole(names(parameter)[0], shape, tensor_shape)

    def norm(parameter: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        yield whole(parameter, (d,))
        if has_bias:
            yield whole(f"{parameter}_bias", (d,))

    def stacked(parameter: str, shape: Shape, axis: int) -> tuple[str, tuple[Piece, ...]]:
        return parameter, _stacked(names(parameter), shape, axis)

    if config.pre_norm:
        yield from norm("attn_norm")
    if config.mla is not None:
        yield from _latent(family, config, layer, tensors)
    else:
        yield "qkv", _qkv(names("qkv"), (k, group, h, d), family.interleaved_rope)
        if config.qkv_bias:
            yield "qkv_bias", _qkv(names("qkv_bias"), (k, group, h), family.interleaved_rope)
        if config.qk_norm == "head":
            yield whole("q_norm", (h,))
            yield whole("k_norm", (h,))
        if config.qk_norm == "full":
            yield whole("q_norm", (k, group, h), (k * group * h,))
            yield whole("k_norm", (k, h), (k * h,))
        if config.attn_sinks:
            yield whole("sinks", (k, group), (k * group,))
        yield whole("attn_out", (d, config.num_heads * h))
    if config.attn_out_bias:
        yield whole("attn_out_bias", (d,))
    if config.post_norm:
        yield whole("attn_post_norm", (d,))
    if config.pre_norm:
        yield from norm("mlp_norm")
    if moe is None or not config.is_moe(layer):
        f, width = config.intermediate_size, 2 if config.mlp == "gated" else 1
        if family.fused_gate_up:
            yield whole("gate_up", (width, f, d), (width * f, d))
        else:
            yield stacked("gate_up", (width, f, d), 0)
        if config.mlp_bias:
            yield stacked("gate_up_bias", (width, f), 0)
        yield whole("down", (d, f))
        if config.mlp_bias:
            yield whole("down_bias", (d,))
    else:
        e, f, shared = moe.num_experts, moe.intermediate_size, moe.shared_intermediate_size
        yield whole("router", (e, d))
        if moe.router_bias:
            yield whole("router_bias", (e,))
        if moe.correction_bias:
            yield whole("correction_bias", (e,))
        yield "experts_gate_up", _experts(names("experts_gate_up"), (e, 2, f, d), tensors)
        if moe.expert_bias:
            yield stacked("experts_gate_up_bias", (e, 2, f), 1)
        yield "experts_down", _experts(names("experts_down"), (e, d, f), tensors)
        if moe.expert_bias:
            yield whole("experts_down_bias", (e, d))
        if shared:
            yield stacked("shared_gate_up", (2, shared, d), 0)
            yield whole("shared_down", (d, shared))
        if shared and moe.shared_gate:
            yield whole("shared_gate", (1, d), (d,))
    if config.post_norm:
        yield whole("mlp_post_norm", (d,))


def _latent(
    family: GGUFFamily, config: ModelConfig, layer: int, tensors: Collection[str]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """The projections of multi-head latent attention."""
    mla, d, n = config.mla, config.hidden_size, config.num_heads
    assert mla is not None
    q_dim, rank = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.kv_lora_rank
    names = {p: f"blk.{layer}.{family.layer_tensors(p)[0]}" for p in LATENT}
    if mla.q_lora_rank is None:
        yield "q_up", _whole(f"blk.{layer}.attn_q.weight", (n, q_dim, d), (n * q_dim, d))
    else:
        yield "q_down", _whole(names["q_down"], (mla.q_lora_rank, d))
        yield "q_down_norm", _whole(names["q_down_norm"], (mla.q_lora_rank,))
        yield "q_up", _whole(names["q_up"], (n, q_dim, mla.q_lora_rank), (n * q_dim, mla.q_lora_rank))
    yield "kv_down", _whole(names["kv_down"], (rank + mla.qk_rope_head_dim, d))
    yield "kv_down_norm", _whole(names["kv_down_norm"], (rank,))
    k_shape, v_shape = (n, mla.qk_nope_head_dim, rank), (n, mla.v_head_dim, rank)
    if (joint := f"blk.{layer}.attn_kv_b.weight") in tensors:  # files made before April 2025: k rows, then v, a head
        rows = k_shape[1] + v_shape[1]
        piece = Piece(joint, (n * rows, rank), (0, 0, 0), k_shape, rows_apart=rows)
        yield "k_up", (piece,)
        yield "v_up", (piece._replace(shape=v_shape, first_row=k_shape[1]),)
    else:
        yield "k_up", (Piece(names["k_up"], (n, rank, k_shape[1]), (0, 0, 0), k_shape, is_transposed=True),)
        yield "v_up", _whole(names["v_up"], v_shape)
    yield "attn_out", _whole(f"blk.{layer}.{family.layer_tensors('attn_out')[0]}", (d, n * mla.v_head_dim))


def _whole(name: str, shape: Shape, tensor_shape: Shape | None = None) -> tuple[Piece, ...]:
    """One tensor, maybe of fewer axes than the parameter."""
    return (Piece(name, tensor_shape or shape, (0,) * len(shape), shape),)


def _qkv(names: tuple[str, ...], q_shape: Shape, interleaved: bool) -> tuple[Piece, ...]:
    """q, k and v as ``[K, G + 2, H, ...]``, from q's own ``[K, G, H, ...]``. One name: q's rows, k's, then v's."""
    (k, group, h), columns = q_shape[:3], q_shape[3:]
    fused_shape = (k * (group + 2) * h, *columns)
    pieces, first_row = [], 0
    for i, (at, heads) in enumerate([(0, group), (group, 1), (group + 1, 1)]):
        rows = k * heads * h
        pieces.append(
            Piece(
                names[0 if len(names) == 1 else i],
                fused_shape if len(names) == 1 else (rows, *columns),
                (0, at, 0, *(0 for _ in columns)),
                (k, heads, h, *columns),
                first_row if len(names) == 1 else 0,
                2 if interleaved and i < 2 else None,
            )
        )
        first_row += rows
    return tuple(pieces)


def _stacked(names: tuple[str, ...], shape: Shape, axis: int) -> tuple[Piece, ...]:
    """One tensor for each index of ``axis``."""
    box = tuple(1 if i == axis else n for i, n in enumerate(shape))
    tensor_shape = tuple(n for i, n in enumerate(shape) if i != axis)
    starts = (tuple(i if a == axis else 0 for a in range(len(shape))) for i in range(len(names)))
    return tuple(Piece(name, tensor_shape, start, box) for name, start in zip(names, starts))


def _experts(names: tuple[str, ...], shape: Shape, tensors: Collection[str]) -> tuple[Piece, ...]:
    """``[E, 2, rows, columns]`` of two names, ``[E, rows, columns]`` of one: a tensor has all experts, or one."""
    blk, layer, first = names[0].split(".", 2)
    if names[0] in tensors or f"{blk}.{layer}.{UNSTACKED_EXPERTS[first].format(e=0)}" not in tensors:
        return _stacked(names, shape, 1) if len(shape) == 4 else _whole(names[0], shape)
    *outer, rows, columns = shape
    box = (*(1 for _ in outer), rows, columns)
    return tuple(
        Piece(
            f"{blk}.{layer}.{UNSTACKED_EXPERTS[name.split('.', 2)[2]].format(e=e)}",
            (rows, columns),
            (e, i, 0, 0) if len(shape) == 4 else (e, 0, 0),
            box,
        )
        for e in range(shape[0])
        for i, name in enumerate(names)
    )
