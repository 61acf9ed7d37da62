"""Every architecture: the config that its metadata mean, and every parameter read back whole and in parts."""

import threading

import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, GGUFCheckpoint
from jaxserve.checkpoint.gguf.families import FAMILIES, GGUFFamily
from jaxserve.model.params import check_params, num_params
from tests.checkpoint.gguf_cases import CASES
from tests.checkpoint.gguf_converter import Case, D, F, H, K, N
from tests.checkpoint.tiny_gguf import read_params, write


def open_case(tmp_path, case: Case, **changes) -> tuple[GGUFCheckpoint, dict[str, np.ndarray]]:
    params = case.params()
    keys = {f"{case.arch}.{key}": value for key, value in changes.items()}
    path = write(
        tmp_path / "m.gguf",
        arch=case.arch,
        arch_keys=case.arch_keys() | keys,
        tensors=case.tensors(params),
    )
    return GGUFCheckpoint(path), params


def whole(array: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in array.shape)


@pytest.mark.parametrize("name", CASES)
def test_config_and_parameters(tmp_path, name):
    checkpoint, params = open_case(tmp_path, CASES[name])
    assert checkpoint.config == CASES[name].model_config()
    assert checkpoint.num_params == num_params(checkpoint.config)
    rng = np.random.default_rng(1)
    for parameter, array in params.items():
        got = checkpoint.read(parameter, whole(array))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array, err_msg=parameter)
        for _ in range(4):
            ends = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in array.shape]
            part = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(checkpoint.read(parameter, part), array[part], err_msg=f"{parameter} {part}")
    check_params(read_params(checkpoint), checkpoint.config)


def test_every_architecture_has_a_case():
    assert {case.arch for case in CASES.values()} == set(FAMILIES)


def test_rows_of_the_tensors_are_where_the_converter_puts_them(tmp_path):
    """By definition, element by element, for one interleaved and one fused family."""
    for name in ("llama, biases", "phi3"):
        case = CASES[name]
        checkpoint, params = open_case(tmp_path, case)
        qkv = params["layers.1.qkv"]
        tensors = {n: checkpoint.load_tensor(n) for n in checkpoint.tensors}
        for head in range(N):
            for i in range(H):
                want = qkv[head // (N // K), head % (N // K), i]
                if name == "phi3":
                    got = tensors["blk.1.attn_qkv.weight"][head * H + i]
                else:
                    got = tensors["blk.1.attn_q.weight"][head * H + (2 * i if i < H // 2 else 2 * (i - H // 2) + 1)]
                np.testing.assert_array_equal(got, want)
        for head in range(K):
            value = qkv[head, N // K + 1]
            first = (N + K + head) * H if name == "phi3" else head * H
            stored = tensors["blk.1.attn_qkv.weight" if name == "phi3" else "blk.1.attn_v.weight"]
            np.testing.assert_array_equal(stored[first : first + H], value)
        if name == "phi3":
            np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"][F:], params["layers.1.gate_up"][1])


def test_threads_read_at_once(tmp_path):
    checkpoint, params = open_case(tmp_path, CASES["qwen2moe"])
    wrong: list[str] = []

    def read_all() -> None:
        for _ in range(5):
            for name, array in params.items():
                if not np.array_equal(checkpoint.read(name, whole(array)), array):
                    wrong.append(name)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reading_what_is_not_there_is_an_error(tmp_path):
    checkpoint, _ = open_case(tmp_path, CASES["qwen2"])
    with pytest.raises(CheckpointError, match=r"m\.gguf: no parameter 'layers\.2\.qkv'"):
        checkpoint.read("layers.2.qkv", (slice(0, 1),))
    with pytest.raises(CheckpointError, match=r"'embed' of shape \(266, 32\) read with 1 slices"):
        checkpoint.read("embed", (slice(0, 1),))
    assert checkpoint.read("embed", (slice(3, 3), slice(0, D))).shape == (0, D)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("embed", (slice(0, 1), slice(0, D)))


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("qwen2", {"attention.sliding_window": 8}, "'qwen2.attention.sliding_window'=8 is not supported"),
        ("qwen2", {"expert_count": 8}, "'qwen2.expert_count'=8 is not supported"),
        ("qwen2", {"nextn_predict_layers": 1}, "'qwen2.nextn_predict_layers'=1 is not supported"),
        ("qwen2", {"attention.layer_norm_epsilon": 1e-5}, "layer_norm_epsilon'=9.99.* is not supported"),
        ("gpt2", {"rope.freq_base": 5000.0}, "'gpt2.rope.freq_base'=5000.0 is not supported"),
        ("qwen2", {"attention.causal": False}, "'qwen2.attention.causal'=False is not supported"),
        ("qwen2", {"attention.value_length": 16}, "attention.value_length=16 differs from the head dimension 8"),
        ("qwen2", {"rope.dimension_count": 10}, "dimension_count=10 must be even and at most 8, the head dimension"),
        ("qwen2", {"rope.dimension_count": 3}, "rope.dimension_count=3 must be even"),
        ("mixtral", {"expert_used_count": 5}, "expert_used_count=5 is more than expert_count=4"),
        ("mixtral", {"expert_count": "8"}, "expert_count='8' must be an integer of at least 0"),
        ("mixtral, one tensor an expert", {"expert_count": 2**32 - 1}, r"expected \(4294967295, 32\)"),
        ("mixtral", {"expert_used_count": None}, "llama.expert_used_count is missing"),
        ("mixtral", {"expert_count": 2**32 - 1}, r"gate_inp.weight' has shape \(4, 32\), expected \(4294967295, 32\)"),
        ("mixtral", {"expert_count": 3}, r"'blk.0.ffn_gate_inp.weight' has shape \(4, 32\), expected \(3, 32\)"),
        ("mixtral", {"expert_gating_func": 9}, "expert_gating_func=9 must be one of 1, 2, 3"),
        ("mixtral", {"expert_weights_norm": 1}, "expert_weights_norm=1 must be true or false"),
        ("mixtral, one tensor an expert", {"expert_count": 5}, r"expected \(5, 32\)"),
        ("qwen3moe", {"expert_feed_forward_length": None}, "qwen3moe.expert_feed_forward_length is missing"),
        ("gemma3", {"attention.sliding_window": -1}, "sliding_window=-1 must be an integer of at least 0"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, "<array of 1> does not have num_layers=7 entries"),
        ("gemma3", {"attention.sliding_window_pattern": [6, 6]}, "sliding_window_pattern=<array of 2> must be"),
        ("llama, yarn", {"rope.scaling.original_context_length": None}, "original_context_length is missing"),
        ("llama, yarn", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5 is not supported, only 1 is"),
        ("llama, yarn", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier.* is not supported"),
        ("llama, linear", {"rope.scaling.yarn_beta_fast": 32.0}, "yarn_beta_fast=32.0 is not supported without"),
        ("llama, linear", {"rope.scaling.attn_factor": 2.0}, "attn_factor=2.0 is not supported without"),
        ("llama, linear", {"rope.scaling.type": "su"}, "rope.scaling.type='su' is not supported, only none, linear"),
        ("llama, linear", {"rope.scaling.type": "longrope"}, r"'rope_factors_long.weight' is missing, expected shape"),
        ("llama 3, factors", {"rope.scaling.type": "yarn"}, "'rope_freqs.weight' together with rope scaling"),
        (
            "phi3, longrope",
            {"rope.dimension_count": 8},
            r"'rope_factors_short.weight' has shape \(2,\), expected \(4,\)",
        ),
        ("phi3, longrope", {"rope.scaling.factor": 4.0}, "factor=4.0 together with tensor 'rope_factors_long.weight'"),
        ("glm4moe", {"nextn_predict_layers": 0}, r"'blk.3.attn_norm.weight' is missing, expected shape \(32,\)"),
        ("glm4moe", {"nextn_predict_layers": 4}, "num_layers=0 must be at least 1"),
        ("deepseek2, V3", {"attention.head_count_kv": 4}, "head_count_kv=4 is not 1"),
        ("deepseek2, V3", {"attention.key_length": 14}, "attention.key_length=14 is not 16"),
        ("deepseek2, V3", {"attention.key_length_mla": 4}, "key_length_mla=4 is not more than rope.dimension_count=4"),
        ("deepseek2, V3", {"attention.kv_lora_rank": None}, "deepseek2.attention.kv_lora_rank is missing"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be a positive number"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, name, changes, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        open_case(tmp_path, CASES[name], **changes)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen2", "blk.1.attn_k.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight"),
        ("llama, biases", "blk.1.attn_q.bias"),
        ("gemma3", "blk.3.post_ffw_norm.weight"),
        ("gpt2", "position_embd.weight"),
        ("gpt2", "output_norm.bias"),
        ("gpt-oss", "blk.1.attn_sinks.weight"),
        ("mixtral, one tensor an expert", "blk.1.ffn_up.3.weight"),
        ("phi3, longrope", "rope_factors_long.weight"),
        ("glm4moe", "blk.1.exp_probs_b.bias"),
        ("deepseek2, V3", "blk.1.attn_k_b.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, tensor):
    case = CASES[name]
    tensors = case.tensors(case.params())
    del tensors[tensor]
    with pytest.raises(CheckpointError, match=f"tensor '{tensor}' is missing, expected shape"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", arch=case.arch, arch_keys=case.arch_keys(), tensors=tensors))


def test_rope_factors_that_are_no_factors_are_refused(tmp_path):
    case = CASES["llama 3, factors"]
    for bad in (0.0, -1.0, np.nan, np.inf):
        tensors = case.tensors(case.params()) | {"rope_freqs.weight": np.array([1, 1, bad, 1], np.float32)}
        path = write(tmp_path / "m.gguf", arch=case.arch, arch_keys=case.arch_keys(), tensors=tensors)
        with pytest.raises(CheckpointError, match=r"m\.gguf: tensor 'rope_freqs\.weight' has factors that are not"):
            GGUFCheckpoint(path)


def test_flags_of_the_table_are_fields_of_the_config():
    from dataclasses import fields

    from jaxserve.config import ModelConfig, MoEConfig

    family: GGUFFamily
    for family in FAMILIES.values():
        assert set(family.flags) <= {f.name for f in fields(ModelConfig)}
        assert set(family.moe) <= {f.name for f in fields(MoEConfig)}


def test_sampling_defaults(tmp_path):
    keys = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.25}
    keys |= {"general.sampling.mirostat": 2, "general.sampling.top_p": "high"}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", keys=keys))
    assert checkpoint.sampling_defaults == {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}
