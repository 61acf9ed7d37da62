"""Reductions over a vocabulary that the devices of a mesh share: each has ``VL`` columns of ``[B, V]``.

What is exchanged is a few numbers a row, never ``[B, V]``. Columns that pad V to a multiple of the devices are -inf
wherever logits are meant, and the last.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.parallel.specs import VOCABULARY


@dataclass(frozen=True)
class Vocabulary:
    """The columns that a device has; with one shard they are all, and no mesh is needed."""

    size: int  # V, without padding
    shards: int = 1

    @property
    def padded_size(self) -> int:
        return -(-self.size // self.shards) * self.shards

    @property
    def width(self) -> int:  # VL
        return self.padded_size // self.shards

    def first_id(self) -> jax.Array | int:
        """The id of this device's first column."""
        return 0 if self.shards == 1 else lax.axis_index(VOCABULARY) * self.width

    def columns(self, ids: jax.Array) -> jax.Array:
        """Where this device has ``ids``; VL, which a scatter drops, for those that it has not."""
        local = ids - self.first_id()
        return jnp.where((local >= 0) & (local < self.width), local, self.width)

    def padding(self) -> jax.Array | bool:
        """[VL] bool, the columns that stand for no token."""
        if self.padded_size == self.size:
            return False
        return self.first_id() + jnp.arange(self.width) >= self.size

    def max(self, x: jax.Array) -> jax.Array:
        """[B] of ``x`` [B, VL]."""
        top = jnp.max(x, axis=1)
        return top if self.shards == 1 else lax.pmax(top, VOCABULARY)

    def total(self, x: jax.Array) -> jax.Array:
        """Sum over the devices of what each has."""
        return x if self.shards == 1 else lax.psum(x, VOCABULARY)

    def argmax(self, x: jax.Array) -> jax.Array:
        """[B] i32, the lowest id of those that have the largest of ``x`` [B, VL]; an id of the vocabulary always."""
        return self.best(*self.local_best(x))

    def local_best(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest [B] of ``x`` [B, VL] on this device and its lowest id [B] i32, for ``best``: ``argmax`` in two
        parts, of which only the second exchanges anything."""
        column = lax.platform_dependent(
            x, cpu=_argmax_of_max, default=partial(lax.argmax, axis=1, index_dtype=jnp.int32)
        )
        value = jnp.take_along_axis(x, column[:, None], axis=1)[:, 0]
        return value, column + self.first_id()

    def best(self, value: jax.Array, ids: jax.Array) -> jax.Array:
        """[B] i32, of the devices' ``local_best``."""
        if self.shards == 1:
            return ids
        is_best = value == lax.pmax(value, VOCABULARY)
        return lax.pmin(jnp.where(is_best, ids, self.size - 1), VOCABULARY)

    def at(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """[B], each row's value of ``x`` [B, VL] at its id of ``ids`` [B]."""
        if self.shards == 1:
            return jnp.take_along_axis(x, ids[:, None], axis=1)[:, 0]
        column = self.columns(ids)
        value = jnp.take_along_axis(x, jnp.minimum(column, self.width - 1)[:, None], axis=1)[:, 0]
        return lax.psum(jnp.where(column < self.width, value, 0), VOCABULARY)

    def logsumexp(self, x: jax.Array) -> jax.Array:
        """[B] of ``x`` [B, VL]."""
        local = jax.nn.logsumexp(x, axis=1)
        if self.shards == 1:
            return local
        top = lax.pmax(local, VOCABULARY)
        return top + jnp.log(lax.psum(jnp.exp(local - top), VOCABULARY))

    def top_k(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """Values and ids [B, min(k, V)] of the largest of ``x`` [B, VL], descending, of equals the lowest id first."""
        values, ids = lax.top_k(x, min(k, self.width))
        if self.shards == 1:
            return values, ids
        # [B, shards * K] each, in one exchange, equals in the order of their ids
        both = jnp.stack([lax.bitcast_convert_type(values, jnp.int32), ids.astype(jnp.int32) + self.first_id()])
        values, ids = lax.all_gather(both, VOCABULARY, axis=2, tiled=True)
        values = lax.bitcast_convert_type(values, jnp.float32)
        values, places = lax.top_k(values, min(k, self.size))
        return values, jnp.take_along_axis(ids, places, axis=1)

    def bits(self, words: jax.Array) -> jax.Array:
        """[B, VL] bool, the bit (id % 32 of word id // 32) of ``words`` [B, W] i32 of each id; False of padding."""
        if self.shards == 1:
            bits = (words[:, :, None] >> jnp.arange(32)) & 1  # [B, W, 32]
            return bits.reshape(words.shape[0], -1)[:, : self.size] == 1
        ids = self.first_id() + jnp.arange(self.width)
        word = words.at[:, ids >> 5].get(mode="fill", fill_value=0)  # [B, VL]
        return ((word >> (ids & 31)) & 1 == 1) & (ids < self.size)


def _argmax_of_max(x: jax.Array) -> jax.Array:
    """``argmax`` [B] i32 of ``x`` [B, VL] in two passes that XLA has vector instructions for on a CPU, where the one of
    values and places together is scalar code, with all that is fused into it."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    top = jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(x == top, places, x.shape[1] - 1), axis=1)


def whole(x: jax.Array) -> Vocabulary:
    """That of ``x`` [B, V], all of which is here."""
    return Vocabulary(x.shape[1])
