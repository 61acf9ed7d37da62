"""The decoder: embedding, layers over stages, head. One for all families; runs inside ``shard_map``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.config import ModelConfig
from jaxserve.model import layers
from jaxserve.model.layers import AttentionContext, LayerKind, StaticContext
from jaxserve.model.lora import Lora
from jaxserve.model.params import LayerParams
from jaxserve.model.quantized import QuantizedMatrix, matmul, table_rows
from jaxserve.model.stage_layers import stage_layers as stage_layers_of
from jaxserve.parallel.specs import VOCABULARY


def embed(table: jax.Array | QuantizedMatrix, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a vocabulary-sharded ``table`` [VL, D] for ``token_ids`` [T]: [T, D], both the same on every device.

    ``dtype`` is that of the rows of a quantized table.
    """
    if lax.axis_size(VOCABULARY) == 1:
        return table_rows(table, token_ids, dtype)
    local = token_ids - lax.axis_index(VOCABULARY) * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = table_rows(table, jnp.where(mine, local, 0), dtype)
    return lax.psum(jnp.where(mine[:, None], rows, 0), VOCABULARY)


def logits(head: jax.Array | QuantizedMatrix, x: jax.Array, config: ModelConfig) -> jax.Array:
    """f32 logits [B, VL] of ``x`` [B, D] and a vocabulary-sharded ``head`` [VL, D].

    Columns that the mesh pads V by are -inf.
    """
    if isinstance(head, QuantizedMatrix):
        out = matmul(x, head, jnp.float32)
    else:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        out = lax.dot_general(
            x, head, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
    if config.logit_scale != 1:
        out = out * config.logit_scale
    if config.logit_softcap is not None:
        out = config.logit_softcap * jnp.tanh(out / config.logit_softcap)
    if out.shape[1] * lax.axis_size(VOCABULARY) == config.vocab_size:
        return out
    ids = lax.axis_index(VOCABULARY) * out.shape[1] + jnp.arange(out.shape[1])
    return jnp.where(ids < config.vocab_size, out, -jnp.inf)


def gathered(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """All logits [B, V] on every device, of ``logits`` [B, VL]."""
    if lax.axis_size(VOCABULARY) > 1:
        logits = lax.all_gather(logits, VOCABULARY, axis=1, tiled=True)
    return logits[:, : config.vocab_size]


def stage_layers(
    stage: tuple[LayerParams, ...],
    kv_pages: tuple[jax.Array, ...],
    x: jax.Array,
    ctx: AttentionContext,
    loras: tuple[Lora | None, ...],
    static: StaticContext,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """This device's layers, unrolled: under ``scan`` XLA copies every layer's weights and pages.

    A kind of layer has a jit of its own, so that it is traced and lowered once and not once a layer. Where the stages
    have layers of different kinds at one place, or some have none, each takes its own branch.

    ``loras`` are the layers' adapters, None where the step has none.
    """
    out = []
    stages = stage_layers_of(static.config, lax.axis_size("stage"))
    by_kind: dict[LayerKind | None, Callable[..., Any]] = {None: lambda p, pages, x, ctx, lora: (x, pages)}
    for i, (p, pages, lora) in enumerate(zip(stage, kv_pages, loras, strict=True)):
        kinds = [layers.layer_kind(static.config, own[i]) if i < len(own) else None for own in stages]
        branches = {}
        for kind in kinds:
            if kind is not None and kind not in by_kind:
                by_kind[kind] = jax.jit(partial(layers.decoder_layer, static=static, kind=kind))
            branches[kind] = by_kind[kind]
        if len(branches) == 1:
            x, pages = branches[kinds[0]](p, pages, x, ctx, lora)
        else:
            branch = jnp.array([list(branches).index(kind) for kind in kinds])[lax.axis_index("stage")]
            x, pages = lax.switch(branch, list(branches.values()), p, pages, x, ctx, lora)
        out.append(pages)
    return x, tuple(out)


def from_stage_before(x: jax.Array, hidden: jax.Array) -> jax.Array:
    """What a stage's layers take: the first ``x`` [T, D], the embedded tokens, the others what the one before made of
    its step in the last tick, the first T rows of its ``hidden`` [TH, D]."""
    num_stages = lax.axis_size("stage")
    if num_stages == 1:
        return x
    arrived = lax.ppermute(hidden[: x.shape[0]], "stage", [(s, s + 1) for s in range(num_stages - 1)])
    return jnp.where(lax.axis_index("stage") == 0, x, arrived.astype(x.dtype))


def from_last_stage(x: jax.Array) -> jax.Array:
    """The last stage's ``x`` on every stage."""
    num_stages = lax.axis_size("stage")
    if num_stages == 1:
        return x
    return lax.psum(jnp.where(lax.axis_index("stage") == num_stages - 1, x, 0), "stage")
