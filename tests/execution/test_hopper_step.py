"""The step as Hopper runs it, its kernels in the interpreter, against the step as CPUs run it."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.config import CacheConfig, ModelConfig, ParallelConfig, RopeConfig
from jaxserve.execution import lowering
from jaxserve.execution.lowering import lower_step, state_shape
from jaxserve.execution.placement import place_params
from jaxserve.model import layers
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from jaxserve.step_io import Bucket, StepDims, new_inputs
from pallas_kernels import dispatch, paged_attention, rope_append
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu_split import Tuning
from tests import tiny
from tests.kernels.gpu_interpreter import INTERPRET, races_found

PAGE_SIZE, NUM_PAGES = 16, 6
CONFIG = replace(  # as Qwen3, with a norm of every query and key
    tiny.CONFIG, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, qk_norm="head"
)


def run(config: ModelConfig, bucket: Bucket) -> tuple[np.ndarray, list[np.ndarray]]:
    """(the logits [B, V] of a step, the pages of its layers behind it): row 0 decodes its 18th token
    in pages 3 and 1, the prompt of 10 tokens, if any, is written to page 4; the other decode row is padding."""
    mesh, dtype = make_mesh(ParallelConfig()), jnp.dtype("bfloat16")
    dims = StepDims(num_slots=2, max_pages_per_seq=2, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    params = place_params(TreeSource(init_params(config, jax.random.key(3)), config), config, config, mesh, dtype)
    buffer, inputs = new_inputs(bucket, dims)
    inputs.token_ids[0], inputs.positions[0], inputs.kv_write_index[0] = 5, 17, 1 * PAGE_SIZE + 1
    inputs.page_table[0], inputs.kv_lens[0] = (3, 1), 18
    if bucket.prefill_tokens:
        tokens = slice(1, 11)
        inputs.token_ids[tokens], inputs.positions[tokens] = range(40, 50), range(10)
        inputs.kv_write_index[tokens] = 4 * PAGE_SIZE + np.arange(10)
        inputs.page_table[2], inputs.kv_lens[2], inputs.prefill_cu_q_lens[:] = 4, 10, (1, 11)
        inputs.sample_index[2] = 10
    shape = state_shape(config, CacheConfig(num_pages=NUM_PAGES, page_size=PAGE_SIZE), dims, [bucket], mesh, dtype)
    r = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shape)
    held = [np.full(x.shape, np.nan, np.float32) for x in shape.kv_pages]
    for pages in held:
        pages[0, 3] = r.normal(size=pages.shape[2:])
        pages[0, 1, :, :, 0] = r.normal(size=pages[0, 1, :, :, 0].shape)
    held = tuple(jax.device_put(x.astype(dtype), s.sharding) for x, s in zip(held, shape.kv_pages, strict=True))
    state = replace(state, inputs=jax.device_put(buffer[None], shape.inputs.sharding), kv_pages=held)
    state, logits = lower_step(config, params, state, dims, bucket, mesh).compile()(params, state, None)
    pages = [np.asarray(x[0].astype(jnp.float32)) for x in state.kv_pages]
    used = [0, 2] if bucket.prefill_tokens else [0]
    return np.asarray(logits)[used], pages


def test_which_models_have_their_rotation_and_append_by_the_kernel():
    half = jnp.dtype(jnp.bfloat16)
    needs = {"rope_append", "rope_append head_dim 64"}
    partial, side_by_side = RopeConfig(rotary_dim=32), RopeConfig(interleaved=True)
    taken = [CONFIG, replace(CONFIG, ropes=(partial,)), replace(CONFIG, layer_ropes=(None,))]
    assert [layers.rope_append_needs(config, 2, half) for config in taken] == [needs] * 3
    refused = [replace(CONFIG, ropes=(side_by_side,)), replace(CONFIG, qk_norm="full"), tiny.CONFIG]
    assert [layers.rope_append_needs(config, 2, half) for config in refused] == [None] * 3
    assert layers.rope_append_needs(CONFIG, 2, jnp.dtype(jnp.int8)) is None
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert dispatch.best(hopper, hopper=frozenset(needs)) == "mosaic_gpu"


@pytest.mark.parametrize("bucket", [Bucket(2, 0, 0), Bucket(2, 16, 1)], ids=["decode", "mixed"])
def test_step_with_hopper_kernels(bucket, monkeypatch):
    want, want_pages = run(CONFIG, bucket)
    traced = []

    def recorded(package):
        kernel = package._IMPLEMENTATIONS["mosaic_gpu"]

        def call(*args, **kwargs):
            traced.append(package)
            return kernel(*args, **kwargs)

        return call

    for package in (paged_attention, rope_append):
        monkeypatch.setitem(package._IMPLEMENTATIONS, "mosaic_gpu", recorded(package))
    monkeypatch.setattr(dispatch, "is_hopper", lambda device: True)
    monkeypatch.setattr(lowering, "ROPE_APPEND_ROWS", 2)
    monkeypatch.setattr(gpu_decode, "default_tuning", lambda head_dim: Tuning(num_sms=2, streams_per_sm=1, ring=2))
    with plgpu.force_gpu_interpret_mode(INTERPRET):
        logits, pages = run(CONFIG, bucket)
    assert traced == [paged_attention] if bucket.prefill_tokens else [rope_append, paged_attention]
    assert not races_found()
    for got, wanted in zip(pages, want_pages, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2**-5, atol=2**-5)  # NaN where nothing was written
    assert np.isnan(pages[0][0]).all() and not np.isnan(pages[0][1, :, :, 1]).any()
    np.testing.assert_allclose(logits, want, atol=0.03 * np.abs(want).max())
