"""Constraints on what a slot's sequence may sample, kept on the device: biases, penalties, banned tokens.

``load`` writes a slot when a sequence takes it, ``constrain`` changes the logits of a step's rows, ``record`` adds what
they sampled. Slots without constraints are stale and not read: ``StepInputs.constrained`` tells.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.constraint_io import (
    FLOAT32_MAX,
    FLOAT_FIELDS,
    MAX_BAD_LEN,
    MAX_BAD_SEQUENCES,
    MAX_BIASES,
    ConstraintDims,
    SlotConstraints,
    slot_shapes,
)
from jaxserve.execution.vocabulary import Vocabulary, whole
from jaxserve.parallel import specs
from jaxserve.step_io import StepInputs


@flax.struct.dataclass
class Constraints:
    """Each slot's, on every device, but of ``seen`` its columns only; donated by whoever returns others."""

    seen: Any  # [R, V] i32, V padded: 2 * occurrences in the output, + 1 where the prompt has the token
    recent: Any  # [R, KW - 1] i32, the last output tokens, the last one last; -1 before the first
    penalties: Any  # [R, 3] f32; this and the following as in ``SlotConstraints``
    bias_ids: Any  # [R, NB] i32
    biases: Any  # [R, NB] f32
    banned: Any  # [R, W] i32
    bad_sequences: Any  # [R, NW, KW] i32


def constraints_shape(dims: ConstraintDims, shards: int = 1) -> Constraints:
    """``Constraints`` of ``ShapeDtypeStruct``s, for ``shards`` devices that share the vocabulary."""

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((dims.num_slots, *shape), jnp.int32)

    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((dims.num_slots, *shape), jnp.float32)

    return Constraints(
        seen=i32(Vocabulary(dims.vocab_size, shards).padded_size),
        recent=i32(MAX_BAD_LEN - 1),
        penalties=f32(3),
        bias_ids=i32(MAX_BIASES),
        biases=f32(MAX_BIASES),
        banned=i32(dims.num_words),
        bad_sequences=i32(MAX_BAD_SEQUENCES, MAX_BAD_LEN),
    )


def constraints_specs() -> Constraints:
    """PartitionSpecs of a ``Constraints``."""
    replicated = dict.fromkeys(Constraints.__dataclass_fields__, specs.REPLICATED)
    return Constraints(**replicated | {"seen": specs.LOGITS})


def load(constraints: Constraints, buffer: jax.Array, dims: ConstraintDims) -> Constraints:
    """``constraints`` with one slot's of ``constraint_io.pack_slot``'s ``buffer``."""
    fields, start = {}, 0
    for name, shape in slot_shapes(dims).items():
        size = math.prod(shape)
        x = lax.slice_in_dim(buffer, start, start + size).reshape(shape)
        fields[name] = lax.bitcast_convert_type(x, jnp.float32) if name in FLOAT_FIELDS else x
        start += size
    new = SlotConstraints(**fields)
    slot, num_prompt, num_tokens = new.slot[0], new.num_tokens[0], new.num_tokens[1]
    position = jnp.arange(dims.max_len)  # [TL]
    in_prompt, in_output = position < num_prompt, (position >= num_prompt) & (position < num_tokens)
    size = constraints.seen.shape[1]
    seen = jnp.zeros(size, jnp.int32)
    seen = seen.at[jnp.where(in_prompt, new.token_ids, size)].max(1, mode="drop")
    seen = seen.at[jnp.where(in_output, new.token_ids, size)].add(2, mode="drop")
    last = num_tokens - jnp.arange(MAX_BAD_LEN - 1, 0, -1)  # [KW - 1] positions
    recent = jnp.where(last >= num_prompt, new.token_ids[jnp.clip(last, 0, dims.max_len - 1)], -1)
    values = new._asdict() | {"seen": seen, "recent": recent}
    return Constraints(
        **{
            name: old.at[slot].set(values[name], mode="drop")
            for name, old in ((name, getattr(constraints, name)) for name in constraints.__dataclass_fields__)
        }
    )


def constrain(
    logits: jax.Array, constraints: Constraints, inputs: StepInputs, vocab: Vocabulary | None = None
) -> jax.Array:
    """``logits`` [B, VL] f32 as the rows' constraints change them; -inf where a token cannot be sampled."""
    vocab = vocab or whole(logits)
    changed = partial(_constrained, logits, constraints, inputs, vocab)
    return lax.cond(jnp.any(inputs.constrained == 1), changed, lambda: logits)


def _constrained(logits: jax.Array, constraints: Constraints, inputs: StepInputs, vocab: Vocabulary) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]  # [B, 1]
    mine = jax.tree.map(lambda x: x.at[inputs.slot_ids].get(mode="clip"), constraints)  # leaves [B, ...]
    repetition, frequency, presence = (mine.penalties[:, i, None] for i in range(3))  # [B, 1]

    x = logits.at[rows, vocab.columns(mine.bias_ids)].add(mine.biases, mode="drop")
    x = jnp.where(mine.seen > 0, jnp.where(x > 0, x / repetition, x * repetition), x)
    count = mine.seen >> 1  # [B, VL], in the output
    x = x - frequency * count - jnp.where(count > 0, presence, 0)
    x = jnp.clip(x, -FLOAT32_MAX, FLOAT32_MAX)  # an extreme repetition penalty must not make inf - inf

    before, last = mine.bad_sequences[:, :, :-1], mine.bad_sequences[:, :, -1]  # [B, NW, KW - 1], [B, NW]
    follows = jnp.all((before < 0) | (before == mine.recent[:, None, :]), axis=2) & (last >= 0)
    x = jnp.where(vocab.bits(mine.banned) | vocab.padding(), -jnp.inf, x)
    x = x.at[rows, jnp.where(follows, vocab.columns(last), vocab.width)].set(-jnp.inf, mode="drop")
    return jnp.where((inputs.constrained == 1)[:, None], x, logits)


def allow(logits: jax.Array, allowed: jax.Array, vocab: Vocabulary | None = None) -> jax.Array:
    """``logits`` [B, VL] with -inf where the bit (i % 32 of word i // 32) of ``allowed`` [B, W] i32 is not set."""
    return jnp.where((vocab or whole(logits)).bits(allowed), logits, -jnp.inf)


def record(
    constraints: Constraints, tokens: jax.Array, inputs: StepInputs, vocab: Vocabulary | None = None
) -> Constraints:
    """``constraints`` after ``tokens`` [B] were sampled by the rows that sample."""
    vocab = vocab or whole(constraints.seen)
    sampled = (inputs.constrained == 1) & (inputs.does_sample == 1)
    slots = jnp.where(sampled, inputs.slot_ids, constraints.seen.shape[0])  # [B]
    recent = constraints.recent.at[slots].get(mode="clip")
    return dataclasses.replace(
        constraints,
        seen=constraints.seen.at[slots, vocab.columns(tokens)].add(2, mode="drop"),
        recent=constraints.recent.at[slots].set(jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1), mode="drop"),
    )
