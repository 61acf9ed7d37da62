"""Adapters as `peft` saved them, and the logits that it computed: of separate, fused and transposed modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hf.adapter import read_adapter
from jaxserve.config import CacheConfig, LoraConfig, ModelConfig, ParallelConfig
from jaxserve.engine.engine import Engine
from jaxserve.execution.adapters import adapters_shape, one_slot_shape, place_adapter, write_slot
from jaxserve.execution.lowering import lower_step, state_shape
from jaxserve.execution.placement import place_params
from jaxserve.model.array_spec import is_spec
from jaxserve.model.lora import Adapter
from jaxserve.model.params import Params, TreeSource, named_leaves, param_specs
from jaxserve.parallel.mesh import make_mesh
from jaxserve.step_io import Bucket, StepDims, new_inputs
from tests.families.golden import check_logits, engine, sampled_logits
from tests.lora import golden
from tests.lora.adapters import merged, random_adapter


def check(served: Engine, adapter: golden.GoldenAdapter, lora: str | None) -> None:
    params = SamplingParams(temperature=0, max_tokens=len(adapter.tokens), ignore_eos=True)
    with sampled_logits(served) as seen:
        (completion,) = served.generate([adapter.prompt], params, lora=lora)
    assert completion.token_ids == adapter.tokens
    check_logits(adapter, seen, adapter.sampled_lengths)
    assert served.stats().recompilations_after_ready == 0


@pytest.mark.parametrize("base, names", [("llama", ("llama_all", "llama_some")), ("gpt2", ("gpt2_fused",))])
def test_logits_and_tokens_are_those_of_peft(base, names):
    adapters = {name: golden.load(name) for name in names}
    paths = {name: adapter.adapter for name, adapter in adapters.items()}
    assert {adapter.folder.name for adapter in adapters.values()} == {base}
    with engine(adapters[names[0]], lora_modules=paths, max_loras=2, max_lora_rank=4) as served:
        for name, adapter in adapters.items():
            check(served, adapter, name)


def test_fused_modules_merged_are_the_same():
    """In the engine that the base model's own test has compiled."""
    adapter = golden.load("phi3_fused")
    with engine(adapter) as served, HFCheckpoint(adapter.folder) as checkpoint:
        served.update_params(merged(whole(checkpoint), read_adapter(adapter.adapter, checkpoint.config, 4)))
        check(served, adapter, None)


def test_beside_experts_and_latents():
    """One step, on stages with layers of different kinds, or none, at one place: an MLP, which may have an adapter, and
    experts."""
    model = golden.models.load("deepseek_v3")
    with HFCheckpoint(model.folder) as checkpoint:
        config, params = checkpoint.config, whole(checkpoint)
    adapter = random_adapter(config, 4, rank=2)
    assert [list(layer) for layer in adapter.layers] == [["attn_out", "gate_up", "down"], *[["attn_out"]] * 3]
    tokens = model.prompt[:16]
    adapted, base = step_logits(config, params, tokens, adapter), step_logits(config, params, tokens, None)
    expected = step_logits(config, merged(params, adapter), tokens, None)
    np.testing.assert_allclose(adapted, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()


def step_logits(config: ModelConfig, params: Params, tokens: list[int], adapter: Adapter | None) -> np.ndarray:
    """[V] after ``tokens``, read by one step on three stages: in each of three ticks all work on it."""
    mesh, dtype, bucket = make_mesh(ParallelConfig(stage=3)), jnp.dtype("float32"), Bucket(0, len(tokens), 1)
    cache = CacheConfig(num_pages=4, page_size=len(tokens))
    dims = StepDims(num_slots=1, max_pages_per_seq=1, num_pages=4, page_size=len(tokens), max_loras=2, hidden_tokens=16)
    placed = place_params(TreeSource(params, config), config, config, mesh, dtype)
    room = None
    if adapter is not None:
        shapes = adapters_shape(config, LoraConfig(max_loras=2, max_rank=3), mesh, dtype)
        room = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
        room = write_slot(room, place_adapter(adapter, config, config, one_slot_shape(shapes)), jnp.int32(1))
    buffer, inputs = new_inputs(bucket, dims)
    inputs.token_ids[:], inputs.positions[:], inputs.kv_write_index[:] = tokens, range(len(tokens)), range(len(tokens))
    inputs.kv_lens[:], inputs.prefill_cu_q_lens[:], inputs.sample_index[:] = (
        len(tokens),
        (0, len(tokens)),
        len(tokens) - 1,
    )
    inputs.adapter_ids[:] = 1
    shape = state_shape(config, cache, dims, [bucket], mesh, dtype)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shape)
    state = dataclasses.replace(state, inputs=jax.device_put(np.stack([buffer] * 3), shape.inputs.sharding))
    step = lower_step(config, placed, state, dims, bucket, mesh, room).compile()
    for _ in range(3):
        state, logits = step(placed, state, room)
    return np.asarray(logits)[0]


def whole(checkpoint: HFCheckpoint) -> Params:
    specs = param_specs(checkpoint.config)
    leaves = [checkpoint.read(name, tuple(slice(0, n) for n in spec.shape)) for name, spec in named_leaves(specs)]
    leaves = [leaf.astype("float32") for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)
