"""Devices that share the vocabulary sample what one device does, and never gather ``[B, V]``."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.config import CacheConfig, ParallelConfig
from jaxserve.constraint_io import ConstraintDims, new_slot, set_bits
from jaxserve.execution import constraints, sampling
from jaxserve.execution.lowering import lower_sampler, lower_step, state_shape
from jaxserve.execution.placement import place_params
from jaxserve.execution.step import make_sampler
from jaxserve.execution.vocabulary import Vocabulary
from jaxserve.model.params import TreeSource
from jaxserve.parallel import specs
from jaxserve.parallel.mesh import make_mesh
from jaxserve.step_io import SAMPLINGS, Bucket, Sampling, StepDims, new_inputs, outputs_shape, unpack_outputs
from tests import tiny
from tests.execution.test_sampling import mixed, rows

V, ROWS, SLOTS = 301, 12, 12  # V divides over no mesh
CONFIG = tiny.CONFIG.__class__(**{**vars(tiny.CONFIG), "vocab_size": V})
DIMS = StepDims(num_slots=SLOTS, max_pages_per_seq=24, num_pages=16, page_size=4)
CONSTRAINT_DIMS = ConstraintDims.of(DIMS, V)
BUCKET = Bucket(ROWS, 0, 0)


def inputs(asked: Sampling, seed: int) -> np.ndarray:
    """A buffer whose rows ask different things, as far as ``asked`` goes."""
    r = np.random.default_rng(seed)
    buffer, fields = new_inputs(BUCKET, DIMS)
    fields.slot_ids[:] = r.permutation(SLOTS)
    fields.kv_lens[:] = r.integers(1, 90, ROWS)
    fields.seed[:] = r.integers(-(2**31), 2**31, (ROWS, 2))
    fields.does_sample[:] = r.random(ROWS) < 0.8
    if asked != "greedy":
        fields.temperature[:] = r.choice([0, 1e-30, 0.3, 1, 2.5, 1e6], ROWS)
        fields.min_p[:] = r.choice([0, 0.02], ROWS)
    if asked in sampling.LOOKS_AT_ALL:
        fields.top_k[:] = r.choice([0, 1, 7, 200, V, 1000], ROWS)
        fields.top_p[:] = r.choice([1, 0.5, 0.9], ROWS)
        fields.min_len[:] = r.choice([0, 100], ROWS)
        fields.stop_ids[:, :3] = r.integers(0, V, (ROWS, 3))
        fields.num_logprobs[:] = r.choice([-1, 0, 20], ROWS)
    if asked == "constrained":
        fields.constrained[:] = r.random(ROWS) < 0.7
    return buffer


def logits(seed: int, shards: int) -> np.ndarray:
    """[B, V padded], with ties at the top that lie on different devices, and a row with one finite logit."""
    x = np.random.default_rng(seed).normal(0, 3, (ROWS, V)).astype(np.float32)
    x[0] = 1.0
    x[1, [299, 160, 90, 30]] = 20.0
    x[2] = np.round(x[2])
    x[3, :-1] = -np.inf
    return np.pad(x, ((0, 0), (0, Vocabulary(V, shards).padded_size - V)), constant_values=-np.inf)


def held(mesh: Mesh) -> constraints.Constraints:
    """Constraints in every slot, loaded as the runner does."""
    shapes = constraints.constraints_shape(CONSTRAINT_DIMS, mesh.size)
    found = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    load = jax.jit(constraints.load, static_argnums=2)
    for slot in range(SLOTS):
        r = np.random.default_rng(slot)
        buffer, views = new_slot(CONSTRAINT_DIMS)
        views.slot[0] = slot
        views.num_tokens[:] = 20, 60
        views.token_ids[:60] = r.integers(0, V, 60)
        views.penalties[:] = r.choice([0.7, 1.5]), 0.4, r.choice([-1.0, 0.5])
        views.bias_ids[:10], views.biases[:10] = r.choice(V, 10, replace=False), r.normal(0, 9, 10)
        set_bits(views.banned, range(slot % 3, V, 3), True)
        views.bad_sequences[0, -1] = 300
        found = load(found, buffer, CONSTRAINT_DIMS)
    return jax.tree.map(lambda x, p: jax.device_put(x, NamedSharding(mesh, p)), found, constraints.constraints_specs())


def run(parallel: ParallelConfig, asked: Sampling) -> list[Any]:
    """Three steps: outputs of each, then the last tokens and what is held."""
    mesh = make_mesh(parallel)
    sampler = jax.jit(make_sampler(CONFIG, mesh, ROWS, DIMS, asked))
    last, now = jnp.zeros(SLOTS, jnp.int32), held(mesh) if asked == "constrained" else None
    packed, found = jnp.zeros(outputs_shape(ROWS, DIMS), jnp.int32), []
    allowed = np.full((ROWS, CONSTRAINT_DIMS.num_words), -1, np.int32)
    allowed[5], allowed[6, :-1] = 1 << np.arange(CONSTRAINT_DIMS.num_words), 0  # of the last word its padding too
    for seed in range(3):
        x = jax.device_put(logits(seed, parallel.num_devices), NamedSharding(mesh, specs.LOGITS))
        bits = None if now is None else allowed
        # The last stage's step is the one that has logits.
        buffers = np.stack([*(inputs(asked, 90 + s) for s in range(parallel.stage - 1)), inputs(asked, seed)])
        last, now, packed = sampler(last, now, packed, x, buffers, bits)
        found.append(unpack_outputs(np.asarray(packed), DIMS.max_logprobs))
    kept = None if now is None else (np.asarray(now.seen)[:, :V], np.asarray(now.recent))
    return [found, np.asarray(last), kept]


@pytest.mark.parametrize("asked", SAMPLINGS)
def test_the_same_as_one_device(asked: Sampling):
    shared = ParallelConfig(stage=2, tensor=1 if asked == "constrained" else 4)
    want, want_last, want_kept = run(ParallelConfig(), asked)
    got, last, kept = run(shared, asked)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        finite = np.isfinite(b.top_logprobs)  # of equals without probability any may be named
        np.testing.assert_array_equal(a.top_ids[finite], b.top_ids[finite])
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(last, want_last)
    jax.tree.map(np.testing.assert_array_equal, kept, want_kept)


def test_the_noise_is_that_of_jax():
    mesh = make_mesh(ParallelConfig(stage=2, tensor=2))
    seed = np.random.default_rng(0).integers(-(2**31), 2**31, (5, 2)).astype(np.int32)
    position = np.arange(5, dtype=np.int32)
    shared = Vocabulary(V, 4)
    got = jax.jit(
        jax.shard_map(
            lambda s, p: sampling.gumbel(s, p, shared), mesh=mesh, in_specs=(P(), P()), out_specs=specs.LOGITS
        )
    )(seed, position)
    alone = jax.jit(lambda s, p: sampling.gumbel(s, p, Vocabulary(V)))(seed, position)

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (V,), jnp.float32)

    want = jax.jit(jax.vmap(row))(seed.view(np.uint32), position)
    np.testing.assert_array_equal(alone, want)
    np.testing.assert_array_equal(np.asarray(got)[:, :V], want)


def test_what_is_kept_is_what_one_device_keeps():
    mesh, num = make_mesh(ParallelConfig(stage=2, tensor=2)), 64
    shared = Vocabulary(V, 4)
    look = jax.jit(
        jax.shard_map(
            lambda x, i: sampling.kept(x, i, "any", shared),
            mesh=mesh,
            in_specs=(specs.LOGITS, P()),
            out_specs=specs.LOGITS,
            check_vma=False,
        )
    )
    for seed in range(4):
        scaled, asked = mixed(num, V, seed)
        want = sampling.kept(jnp.asarray(scaled), rows(num, **asked))
        padded = np.pad(scaled, ((0, 0), (0, shared.padded_size - V)), constant_values=-np.inf)
        got = np.asarray(look(jax.device_put(padded, NamedSharding(mesh, specs.LOGITS)), rows(num, **asked)))[:, :V]
        np.testing.assert_array_equal(got & np.isfinite(scaled), np.asarray(want) & np.isfinite(scaled))


def gathered_sizes(compiled: jax.stages.Compiled) -> list[int]:
    """Elements of each result of an all-gather."""
    found = re.findall(r"= (.*?) all-gather(?:-start)?\(", compiled.as_text() or "")
    return [
        math.prod(map(int, filter(None, d.split(",")))) for text in found for d in re.findall(r"\[([\d,]*)\]", text)
    ]


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(stage=2)], ids=str)
@pytest.mark.parametrize("asked", SAMPLINGS)
def test_logits_are_not_gathered(asked: Sampling, parallel: ParallelConfig):
    """What a row's best tokens take is all that an all-gather brings, in the step and in its sampler."""
    mesh, dims = make_mesh(parallel), replace(DIMS, hidden_tokens=ROWS)
    params = place_params(TreeSource(tiny.params(), tiny.CONFIG), tiny.CONFIG, tiny.CONFIG, mesh, jnp.dtype("float32"))
    tables = (params.embed, params.head)
    assert [x.sharding.shard_shape(x.shape)[0] for x in tables] == [-(-tiny.CONFIG.vocab_size // 2)] * 2
    cache = CacheConfig(num_pages=16, page_size=4)
    state = state_shape(tiny.CONFIG, cache, dims, [BUCKET], mesh, jnp.dtype("float32"))
    sampler = lower_sampler(tiny.CONFIG, state, dims, ROWS, mesh, asked).compile()
    values_and_ids = ROWS * 2 * 2 * DIMS.max_logprobs  # of two devices
    assert gathered_sizes(sampler) == ([values_and_ids] if asked in sampling.LOOKS_AT_ALL else [])
    if asked == "greedy":
        assert gathered_sizes(lower_step(tiny.CONFIG, params, state, dims, BUCKET, mesh).compile()) == []
