"""Adapters as `peft` saved them, and the logits that it computed: of separate, fused and transposed modules."""

import jax
import pytest

from jaxserve import SamplingParams
from jaxserve.checkpoint.hf import HFCheckpoint
from jaxserve.checkpoint.hf.adapter import read_adapter
from jaxserve.engine.engine import Engine
from jaxserve.model.array_spec import is_spec
from jaxserve.model.params import Params, named_leaves, param_specs
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
    """Two stages whose layers are of different kinds at one place: an MLP, which may have an adapter, and experts."""
    model = golden.models.load("deepseek_v3")
    with HFCheckpoint(model.folder) as checkpoint:
        config, params = checkpoint.config, whole(checkpoint)
    adapter = random_adapter(config, 4, rank=2)
    assert [list(layer) for layer in adapter.layers] == [["attn_out", "gate_up", "down"], *[["attn_out"]] * 3]
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with engine(model, mesh="stage=2", max_loras=1, max_lora_rank=2) as served:
        served.add_lora("it", adapter)
        (base,) = served.generate([model.prompt], sampling)
        (adapted,) = served.generate([model.prompt], sampling, lora="it")
        served.update_params(merged(params, adapter))
        (expected,) = served.generate([model.prompt], sampling)
    assert adapted.token_ids == expected.token_ids != base.token_ids


def whole(checkpoint: HFCheckpoint) -> Params:
    specs = param_specs(checkpoint.config)
    leaves = [checkpoint.read(name, tuple(slice(0, n) for n in spec.shape)) for name, spec in named_leaves(specs)]
    leaves = [leaf.astype("float32") for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)
