"""config.json of real models: each is read, or refused for a key that we cannot serve, and never for a harmless one.

Sizes are checked as the two numbers that all of them go into: the parameters that the makers publish, and the bytes
that a token of context costs in bfloat16.
"""

import json

import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.hf.config import read_hf_config
from jaxserve.checkpoint.shapes import read_shape
from jaxserve.model.params import num_params
from tests.checkpoint.hub_configs import CONFIGS
from tests.checkpoint.hub_quantized import QUANTIZED, SERVED_QUANTIZED

# Millions of parameters as published (without layers that only draft), bytes of K and V a token, first rope's scaling,
# windows of the first two layers.
EXPECTED: dict[str, tuple[float, int, str, tuple[int | None, int | None]]] = {
    "Llama-2-7b-hf": (6738.4, 524288, "none", (None, None)),
    "Llama-3.1-8B-Instruct": (8030.3, 131072, "llama3", (None, None)),
    "Llama-3.1-70B": (70553.7, 327680, "llama3", (None, None)),
    "Llama-3.2-1B": (1235.8, 32768, "llama3", (None, None)),
    "SmolLM2-135M": (134.5, 23040, "none", (None, None)),
    "SmolLM2-1.7B-Instruct": (1711.4, 196608, "none", (None, None)),
    "Mistral-7B-v0.1": (7241.7, 131072, "none", (4096, 4096)),
    "Mistral-7B-Instruct-v0.2": (7241.7, 131072, "none", (None, None)),
    "Mistral-7B-Instruct-v0.3": (7248.0, 131072, "none", (None, None)),
    "Mistral-Nemo-Instruct-2407": (12247.8, 163840, "none", (None, None)),
    "Mixtral-8x7B-Instruct-v0.1": (46702.8, 131072, "none", (None, None)),
    "Qwen2.5-0.5B": (494.0, 12288, "none", (None, None)),
    "Qwen2.5-1.5B-Instruct": (1543.7, 28672, "none", (None, None)),
    "Qwen2.5-3B": (3085.9, 36864, "none", (None, None)),
    "Qwen2.5-7B-Instruct": (7615.6, 57344, "none", (None, None)),
    "Qwen2.5-14B": (14770.0, 196608, "none", (None, None)),
    "Qwen2.5-32B-Instruct": (32763.9, 262144, "none", (None, None)),
    "Qwen2.5-72B-Instruct": (72706.2, 327680, "none", (None, None)),
    "Qwen1.5-MoE-A2.7B": (14315.8, 196608, "none", (None, None)),
    "Qwen2-57B-A14B": (57409.0, 57344, "none", (None, None)),
    "Qwen3-8B": (8190.7, 147456, "none", (None, None)),
    "Qwen3-30B-A3B": (30532.1, 98304, "none", (None, None)),
    "Qwen3-235B-A22B": (235093.6, 192512, "none", (None, None)),
    "SmolLM3-3B": (3075.1, 73728, "none", (None, None)),
    "gemma-2b": (2506.2, 18432, "none", (None, None)),
    "gemma-7b": (8537.7, 458752, "none", (None, None)),
    "gemma-2-2b": (2614.3, 106496, "none", (4096, None)),
    "gemma-2-9b-it": (9241.7, 344064, "none", (4096, None)),
    "gemma-2-27b": (27227.1, 376832, "none", (4096, None)),
    "gemma-3-1b-it": (999.9, 26624, "none", (512, 512)),
    "gemma-3-270m": (268.1, 18432, "none", (512, 512)),
    "Phi-3-mini-4k-instruct": (3821.1, 393216, "none", (2047, 2047)),
    "Phi-3-mini-128k-instruct": (3821.1, 393216, "longrope", (262144, 262144)),
    "Phi-3-medium-128k-instruct": (13960.2, 204800, "longrope", (131072, 131072)),
    "Phi-3.5-mini-instruct": (3821.1, 393216, "longrope", (262144, 262144)),
    "phi-4": (14659.5, 204800, "none", (None, None)),
    "Phi-4-mini-instruct": (3836.0, 131072, "longrope", (262144, 262144)),
    "OLMo-2-1124-7B": (7298.6, 524288, "none", (None, None)),
    "OLMo-2-1124-13B": (13716.2, 819200, "none", (None, None)),
    "granite-3.1-2b-instruct": (2533.5, 81920, "none", (None, None)),
    "granite-3.1-8b-instruct": (8170.8, 163840, "none", (None, None)),
    "starcoder2-3b": (3030.4, 30720, "none", (4096, 4096)),
    "starcoder2-7b": (7173.9, 65536, "none", (4096, 4096)),
    "starcoder2-15b": (15957.9, 81920, "none", (4096, 4096)),
    "gpt2": (124.4, 36864, "learned", (None, None)),
    "gpt2-medium": (354.8, 98304, "learned", (None, None)),
    "gpt2-xl": (1557.6, 307200, "learned", (None, None)),
    "gpt-oss-20b": (20914.8, 49152, "yarn", (128, None)),
    "gpt-oss-120b": (116829.2, 73728, "yarn", (128, None)),
    "GLM-4.5": (355000, 376832, "none", (None, None)),
    "GLM-4.5-Air": (106000, 188416, "none", (None, None)),
    "DeepSeek-V2-Lite": (15706.5, 31104, "yarn", (None, None)),
    "DeepSeek-V2": (235741.4, 69120, "yarn", (None, None)),
    "DeepSeek-V3": (671026.4, 70272, "yarn", (None, None)),
    "Moonlight-16B-A3B": (15960.1, 31104, "none", (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name):
    config = read_hf_config(CONFIGS[name])
    millions, kv_bytes, scaling, windows = EXPECTED[name]
    assert num_params(config) == pytest.approx(millions * 1e6, rel=0.01)
    assert config.kv_bytes_per_token(2) == kv_bytes
    assert (config.ropes[0].scaling if config.ropes else "learned") == scaling
    assert (config.window(0), config.window(1)) == windows


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_models_are_refused_by_name(name):
    with pytest.raises(
        CheckpointError,
        match=r"^config.json: quantization_config(.scale_fmt='ue8m0'| with quant_method='mxfp4') is not",
    ):
        read_hf_config(QUANTIZED[name])


@pytest.mark.parametrize("name", SERVED_QUANTIZED)
def test_quantized_models_have_the_config_of_the_plain_ones(name, tmp_path):
    values = SERVED_QUANTIZED[name]
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    assert read_hf_config(values) == read_hf_config(plain)
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = read_shape(tmp_path)  # of which every matrix of the layers is taken to be quantized
    assert shape.quantization is not None
    formats = shape.quantization.formats()
    assert {"layers.2.attn_out", f"layers.{shape.num_layers - 1}.attn_out"} <= formats.keys()
    assert not {"embed", "head", "layers.0.k_up"} & formats.keys()
    assert num_params(shape) == num_params(read_hf_config(plain))


def test_what_else_tells_them_apart():
    read = {name: read_hf_config(values) for name, values in CONFIGS.items()}
    assert read["gemma-2b"].activation == read["gemma-7b"].activation == "gelu_tanh"
    assert read["gemma-2-27b"].attn_scale == 144**-0.5
    assert read["gemma-2-27b"].tie_word_embeddings and not read["starcoder2-15b"].tie_word_embeddings
    assert read["SmolLM3-3B"].layer_ropes == (0, 0, 0, None) * 9
    assert read["Phi-4-mini-instruct"].ropes[0].rotary_dim == 96
    assert read["GLM-4.5"].qk_norm == "head" and read["GLM-4.5-Air"].qk_norm == "none"
    groups = {name: read[name].moe for name in ("DeepSeek-V2-Lite", "DeepSeek-V2")}
    assert [moe and moe.num_groups for moe in groups.values()] == [1, 8]
    moonlight = read["Moonlight-16B-A3B"]
    assert moonlight.mla is not None and (moonlight.norm_eps, moonlight.mla.norm_eps) == (1e-5, 1e-6)
    assert read["Llama-3.1-8B-Instruct"].eos_token_ids == (128001, 128008, 128009)
