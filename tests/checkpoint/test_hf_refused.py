"""What of a config.json is not served is refused by its key and value."""

from typing import Any

import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.checkpoint.hf.families import FAMILIES
from tests.checkpoint.tiny_hf import config, read

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["MambaForCausalLM"]},
        "architecture 'MambaForCausalLM' is not supported, only Ll",
    ),
    "two architectures": ({"architectures": ["A", "B"]}, r"architectures=\['A', 'B'\]: expected a list of one name"),
    "architecture's type": ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM': expected a list"),
    "model type": ({"model_type": "mistral"}, "model_type='mistral' contradicts architecture LlamaForCausalLM"),
    "no architecture": (
        {"architectures": None, "model_type": "mamba"},
        "model_type='mamba' is not supported, only llam",
    ),
    "unknown key": ({"use_magic": 3}, "use_magic=3 is not supported"),
    "unknown key, false": ({"use_magic": False}, "use_magic=False is not supported"),
    "key of any text": ({"a\nb\ud800": 3}, r"'a\\nb\\ud800'=3 is not supported"),
    "long key": ({"k" * 500: 3}, r"'k+\.\.\.=3 is not supported"),
    "long value": ({"use_magic": "x" * 500}, r"use_magic='x+\.\.\. is not supported"),
    "quantized": (
        {"quantization_config": {"quant_method": "quip", "bits": 2}},
        "quantization_config with quant_method='quip' is not supported",
    ),
    "images": ({"vision_config": {}, "text_config": {}}, "text_config or vision_config: a model of text and images"),
    "window": ({"sliding_window": 8}, "sliding_window=8 is not supported, only null"),
    "layer types": ({"layer_types": ["full_attention"] * 2}, "layer_types=.* is not supported"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported, only False"),
    "activation": ({"hidden_act": "relu6"}, "hidden_act='relu6': expected one of silu"),
    "size": ({"hidden_size": ...}, "hidden_size is missing"),
    "null size": ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    "size's type": ({"hidden_size": "12"}, r"hidden_size='12': expected an integer in \[1, 2147483647\]"),
    "size, true": ({"vocab_size": True}, "vocab_size=True: expected an integer"),
    "size, float": ({"vocab_size": 19.0}, "vocab_size=19.0: expected an integer"),
    "size, 0": ({"intermediate_size": 0}, "intermediate_size=0: expected"),
    "size, huge": ({"vocab_size": 2**31}, "vocab_size=2147483648: expected"),
    "size, thousands of digits": ({"vocab_size": 10**4000}, "vocab_size=<integer of 13288 bits>: expected"),
    "layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000: expected an integer in \[1, 512\]"),
    "heads": ({"head_dim": None, "num_attention_heads": 5}, "hidden_size=12 is not divisible by num_attention_heads=5"),
    "kv heads": ({"num_key_value_heads": 4}, "num_heads=6 is not divisible by num_kv_heads=4"),
    "odd head": ({"head_dim": 5}, "partial_rotary_factor=1.0 of head_dim=5 is not an even size"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps=0: expected a positive number"),
    "eps, list": ({"rms_norm_eps": [1e-5]}, r"rms_norm_eps=\[1e-05\]: expected a positive number"),
    "flag": ({"attention_bias": 1}, "attention_bias=1: expected true or false"),
    "eos": ({"eos_token_id": -1}, "eos_token_id=-1: expected token ids"),
    "eos, list": ({"eos_token_id": [1, "x"]}, r"eos_token_id=\[1, 'x'\]: expected token ids"),
    "rope type": (
        {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}},
        "rope type 'ntk' is not supported, only",
    ),
    "rope type's type": ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope type \['yarn'\] is not supported"),
    "rope types": (
        {"rope_scaling": {"rope_type": "yarn", "type": "linear"}},
        "rope_scaling.rope_type='yarn' contradicts rope_",
    ),
    "rope keys": ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 8}}, r"rope_scaling.beta_fast=8 is"),
    "rope, no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "rope, twice": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
        "rope_scaling and rope_parameters are both given",
    ),
    "rope theta, twice": (
        {"rope_theta": 2e4, "rope_parameters": {"rope_theta": 1e4}},
        "rope_theta=20000.0 contradicts rope_par",
    ),
    "rope, list": ({"rope_scaling": [1]}, r"rope_scaling=\[1\] is not an object"),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {}}},
        "rope_parameters.full_attention=.* is not supported",
    ),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    "partial rope, inside": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5 is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name_and_value(case):
    changes, complaint = REFUSED[case]
    with pytest.raises(CheckpointError, match=f"^config.json: {complaint}") as error:
        read("LlamaForCausalLM", **changes)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


REFUSED_ELSEWHERE: dict[str, tuple[str, dict[str, Any], str]] = {
    "longrope's length": (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
        r"rope_scaling.short_factor=\[1.0\]: expected a list of 2 numbers",
    ),
    "bias of phi3's head": (
        "Phi3ForCausalLM",
        {"lm_head_bias": True},
        "lm_head_bias=True is not supported, only False",
    ),
    "bidirectional": ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "activations": (
        "Gemma2ForCausalLM",
        {"hidden_activation": "gelu"},
        "hidden_activation='gelu' and hidden_act='silu'",
    ),
    "layer types' length": (
        "Qwen3ForCausalLM",
        {"layer_types": ["full_attention"]},
        r"layer_types=\['full_att...\]: expected a list of 2",
    ),
    "layer type": (
        "Qwen3ForCausalLM",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "expected 'sliding_attention' or 'full_attention', one is 'chunked_attention'",
    ),
    "no window": (
        "Qwen3ForCausalLM",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types has 'sliding_attention' but there is no sliding_window",
    ),
    "no_rope_layers": ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]: expected a list of 2"),
    "experts": ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 to choose"),
    "swiglu": ("GptOssForCausalLM", {"swiglu_limit": 6.0}, "swiglu_limit=6.0 is not supported, only 7.0"),
    "context": (
        "GptOssForCausalLM",
        {"initial_context_length": 8192},
        "initial_context_length=8192 is not supported, only 4096",
    ),
    "groups": ("Glm4MoeForCausalLM", {"n_group": 3}, "n_group=3 with topk_group=1 does not fit 128 experts"),
    "scoring": (
        "Glm4MoeForCausalLM",
        {"scoring_func": "softmax"},
        "scoring_func='softmax' is not supported, only 'sigmoid'",
    ),
    "mixed layers": ("Glm4MoeForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
    "latent bias": (
        "DeepseekV3ForCausalLM",
        {"attention_bias": True, "num_key_value_heads": 6, "head_dim": None},
        "attent",
    ),
    "latent heads": ("DeepseekV3ForCausalLM", {"head_dim": None}, "num_key_value_heads=2 is not supported, only 6"),
}


@pytest.mark.parametrize("case", REFUSED_ELSEWHERE)
def test_what_one_family_does_not_serve(case):
    architecture, changes, complaint = REFUSED_ELSEWHERE[case]
    with pytest.raises(CheckpointError, match=complaint):
        read(architecture, **changes)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_key_of_any_family_is_silently_ignored(architecture):
    """A key of one family is unknown to another, unless that family's table has it."""
    with pytest.raises(CheckpointError, match="some_future_switch=1 is not supported"):
        read_hf_config({"some_future_switch": 1} | small(architecture))


def small(architecture: str) -> dict[str, Any]:
    """The least config.json that the family takes."""
    family = FAMILIES[architecture]
    values = config(architecture, family.model_type)
    if family.model_type.startswith("deepseek"):
        values |= {"head_dim": None, "num_key_value_heads": None, "num_experts_per_tok": 4}
    read_hf_config(values)
    return values
