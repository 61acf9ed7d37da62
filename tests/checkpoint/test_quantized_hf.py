"""Quantized Hugging Face folders against the same models dequantized: every layout read whole and in parts."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.checkpoint import CheckpointError, HFCheckpoint
from jaxserve.checkpoint.dequantize import DequantizedSource
from jaxserve.checkpoint.hf.files import TensorFiles
from jaxserve.model.params import named_leaves, param_specs
from tests.checkpoint import quantized_hf
from tests.checkpoint.quantized_hf import SCHEMES, gptq, gptq_config, write_pair
from tests.checkpoint.tiny_hf import write_folder
from tests.families import golden as goldens
from tests.oracle import oracle_logits


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def parts(shape: tuple[int, ...], r: np.random.Generator) -> tuple[slice, ...]:
    starts = [int(r.integers(0, n)) for n in shape]
    return tuple(slice(start, int(r.integers(start + 1, n + 1))) for start, n in zip(starts, shape))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_parameters_are_those_of_the_dequantized_model(name, tmp_path):
    golden, config, pack = SCHEMES[name]
    quantized, plain = write_pair(golden, config, pack, tmp_path)
    r = np.random.default_rng(0)
    with (
        HFCheckpoint(quantized) as checkpoint,
        HFCheckpoint(quantized, quantization="none") as dequantized,
        HFCheckpoint(plain) as expected,
    ):
        assert checkpoint.config.quantization is not None
        assert dequantized.config == expected.config == dataclasses.replace(checkpoint.config, quantization=None)
        source = DequantizedSource(checkpoint.read, checkpoint.config)
        for parameter, spec in named_leaves(param_specs(expected.config)):
            want = expected.read(parameter, whole(spec.shape))
            error = 2e-6 * np.abs(want).max()
            np.testing.assert_allclose(source.read(parameter, whole(spec.shape)), want, atol=error, err_msg=parameter)
            np.testing.assert_allclose(dequantized.read(parameter, whole(spec.shape)), want, atol=error)
            part = parts(spec.shape, r)
            np.testing.assert_allclose(
                source.read(parameter, part), want[part], atol=error, err_msg=f"{parameter} {part}"
            )
        for leaf, spec in named_leaves(param_specs(checkpoint.config)):
            array, part = checkpoint.read(leaf, whole(spec.shape)), parts(spec.shape, r)
            assert array.shape == spec.shape and array.dtype.name == (spec.dtype or array.dtype.name), leaf
            np.testing.assert_array_equal(checkpoint.read(leaf, part), array[part], err_msg=f"{leaf} {part}")
            name, _, array_name = leaf.rpartition(".")
            if array_name == "bias" and spec.dtype is not None:
                scale = checkpoint.read(f"{name}.scale", whole(spec.shape))
                zeros = -array / np.where(scale == 0, 1, scale)
                form = checkpoint.config.quantization.formats()[name]
                assert form.has_whole_zeros == (form.kind == "int4")
                np.testing.assert_allclose(zeros, np.round(zeros), atol=1e-5)
                assert form.kind != "int4" or (zeros.min() >= 0 and zeros.max() <= 16)


def formats_of(folder: Path) -> dict[str, str]:
    """Parameter of the first layer with experts, or of the first -> kind and what goes with it."""
    with HFCheckpoint(folder) as checkpoint:
        assert checkpoint.config.quantization is not None
        formats = checkpoint.config.quantization.formats()
        config = checkpoint.config
    layer = next((i for i in range(config.num_layers) if config.is_moe(i)), 0)
    found = {}
    for name, f in formats.items():
        if name.startswith(f"layers.{layer}."):
            extras = ["bias"] * f.has_bias + ["perm"] * f.has_perm + [f.activations] * (f.activations != "none")
            found[name.split(".")[2]] = " ".join([f.kind, str(f.group_size), *extras])
    return found


ALL = ("qkv", "attn_out", "gate_up", "down")
MOE = ("qkv", "attn_out", "experts_gate_up", "experts_down")


@pytest.mark.parametrize(
    "name, want",
    {
        "gptq": dict.fromkeys(ALL, "int4 8"),
        "gptq, act-order": dict.fromkeys(ALL, "int4 8 bias perm"),
        # Fused from modules that are sorted otherwise: dequantized.
        "gptq, orders of their own": dict.fromkeys(("attn_out", "down"), "int4 8 perm"),
        "gptq, 8 bits a row": dict.fromkeys(ALL, "int8 None"),
        "gptq, experts": dict.fromkeys((*MOE, "shared_gate_up", "shared_down"), "int4 8 perm"),
        "awq, experts": dict.fromkeys(MOE, "int4 8 bias"),
        "w8a8": dict.fromkeys(ALL, "int8 None int8"),
        "fp8 in blocks": dict.fromkeys(
            ("q_down", "q_up", "kv_down", "attn_out", *MOE[2:], "shared_gate_up", "shared_down"), "fp8 8 fp8"
        ),
        "float, one scale": dict.fromkeys(ALL, "fp8 None"),
    }.items(),
)
def test_what_stays_quantized(name, want, tmp_path):
    golden, config, pack = SCHEMES[name]
    assert formats_of(write_pair(golden, config, pack, tmp_path)[0]) == want


def test_excluded_modules_stay_as_they_are(tmp_path):
    rules = {"-:model\\.layers\\.1\\..*": {}, "-:.*k_proj": {}}
    quantized, _ = write_pair(
        "llama", gptq_config(dynamic=rules), gptq(), tmp_path, excluded=r"layers\.1\.|k_proj"
    )  # fmt: skip
    with HFCheckpoint(quantized) as checkpoint:
        assert checkpoint.config.quantization is not None
        formats = checkpoint.config.quantization.formats()
        assert not any(name.startswith("layers.1.") or name.endswith(".qkv") for name in formats)
        assert "layers.0.down" in formats and "layers.0.attn_out" in formats
        assert checkpoint.read("layers.1.down", whole((32, 48))).dtype.name == "bfloat16"


def test_a_head_may_be_quantized(tmp_path):
    """Of 99 rows: the last words of the zero points are not full."""
    quantized, plain = write_pair("llama", gptq_config(lm_head=True), gptq(), tmp_path, also="lm_head")
    with HFCheckpoint(quantized) as checkpoint, HFCheckpoint(plain) as expected:
        assert checkpoint.config.quantization is not None and "head" in checkpoint.config.quantization.formats()
        source = DequantizedSource(checkpoint.read, checkpoint.config)
        want = expected.read("head", whole((99, 32)))
        np.testing.assert_allclose(source.read("head", whole((99, 32))), want, atol=2e-6 * np.abs(want).max())


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def test_logits_on_a_mesh_are_those_of_the_dequantized_model(tmp_path):
    quantized, plain = write_pair(*SCHEMES["gptq, act-order"], tmp_path)
    golden = dataclasses.replace(goldens.load("llama"), folder=quantized)
    with goldens.engine(golden, mesh="stage=2,tensor=2") as engine, goldens.sampled_logits(engine) as seen:
        engine.generate([golden.prompt], greedy(6))
    with HFCheckpoint(plain) as checkpoint:
        check_against_oracle(checkpoint, golden.prompt, seen)


def check_against_oracle(checkpoint: HFCheckpoint, prompt: list[int], seen: list[tuple[int, np.ndarray]]) -> None:
    import jax

    specs = param_specs(checkpoint.config)
    leaves = [checkpoint.read(name, whole(spec.shape)) for name, spec in named_leaves(specs)]
    params = jax.tree.unflatten(jax.tree.structure(specs, is_leaf=lambda x: hasattr(x, "axes")), leaves)
    tokens = [*prompt, *(int(np.argmax(logits)) for _, logits in seen[:-1])]
    want = oracle_logits(checkpoint.config, params, tokens)
    for length, logits in seen:
        expected = want[length - 1]
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5


def test_experts_on_a_mesh_are_those_of_the_dequantized_model(tmp_path):
    quantized, plain = write_pair(*SCHEMES["awq, experts"], tmp_path)
    golden, logits = goldens.load("mixtral"), {}
    for folder, mesh in ((quantized, "tensor=2"), (plain, None)):
        moved = dataclasses.replace(golden, folder=folder)
        with goldens.engine(moved, mesh=mesh) as engine, goldens.sampled_logits(engine) as seen:
            engine.generate([golden.prompt], greedy(3))
        logits[folder] = np.stack([x for _, x in seen])
    error = np.abs(logits[quantized] - logits[plain]).max() / np.abs(logits[plain]).max()
    assert error < 1e-5


# What is wrong, and refused.

Q = "model.layers.1.self_attn.q_proj"


def broken(tmp_path: Path, change, config=None) -> str:
    """What opening (or reading) says after ``change`` of the tensors of a folder in GPTQ's layout."""
    folder, _ = write_pair("llama", config or gptq_config(), gptq(), tmp_path)
    files = TensorFiles(folder)
    tensors = {name: np.array(files[name]) for name in files}
    files.close()
    change(tensors)

    write_folder(folder, json.loads((folder / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError) as error, HFCheckpoint(folder) as checkpoint:
        for name, spec in named_leaves(param_specs(checkpoint.config)):
            checkpoint.read(name, whole(spec.shape))
    assert str(folder) in str(error.value) or "tensor" in str(error.value)
    return str(error.value)


def put(suffix: str, value):
    def change(tensors):
        before = tensors.pop(f"{Q}.{suffix}")
        if value is not None:
            tensors[f"{Q}.{suffix}"] = value(before)

    return change


def with_one(x: np.ndarray, value: int) -> np.ndarray:
    x = x.copy()
    x.flat[5] = value
    return x


@pytest.mark.parametrize(
    "change, message",
    [
        (put("scales", None), f"tensor '{Q}.scales' is missing"),
        (put("qzeros", None), f"tensor '{Q}.qzeros' is missing"),
        (put("qweight", None), f"tensor '{Q}.weight' is missing, expected shape (32, 32)"),
        (put("scales", lambda x: x[:3]), f"tensor '{Q}.scales' has shape (3, 32), expected (4, 32)"),
        (put("scales", lambda x: x.astype(np.int32)), f"tensor '{Q}.scales' is of type I32, expected F64 or F32 or"),
        (put("qweight", lambda x: x.view(np.uint8)), f"tensor '{Q}.qweight' is of type U8, expected I32"),
        (put("qweight", lambda x: x[:-1]), f"tensor '{Q}.scales' has shape (4, 32), expected (3, 32)"),
        (put("qzeros", lambda x: x[:, :2]), f"tensor '{Q}.qzeros' has shape (4, 2), expected (4, 4)"),
        (put("g_idx", lambda x: with_one(x, 4)), f"tensor '{Q}.g_idx' has group 4, there are 4"),
        (put("g_idx", lambda x: with_one(x, -1)), f"tensor '{Q}.g_idx' has group -1, there are 4"),
        (put("g_idx", lambda x: with_one(x, 3)), f"tensor '{Q}.g_idx' has 7 columns in group 0, expected 8"),
        (put("g_idx", lambda x: x[1:]), f"tensor '{Q}.g_idx' has shape (31,), expected (32,)"),
        (put("qzeros", lambda x: x + 1), f"tensor '{Q}.qzeros' has a zero point of 9, a symmetric module has 8"),
    ],
)
def test_broken_modules_are_named(change, message, tmp_path):
    assert message in broken(tmp_path, change)


@pytest.mark.parametrize(
    "config, message",
    [
        (gptq_config(group_size=20), "has 48 input columns, which group_size=20 does not divide"),
        (gptq_config(dynamic={"-:.*q_proj": {}}), "is quantized, but quantization_config excludes its module"),
    ],
)
def test_configs_that_contradict_the_tensors(config, message, tmp_path):
    assert message in broken(tmp_path, lambda tensors: None, config)


INT8 = quantized_hf.compressed("int-quantized", {}, quantized_hf.TOKEN)
REFUSED = {
    "3 bits": (gptq_config(bits=3), "bits=3 is not supported, only 4 or 8"),
    "marlin": (gptq_config(is_marlin_format=True), "is_marlin_format=True is not supported"),
    "marlin format": (gptq_config(checkpoint_format="marlin"), "checkpoint_format='marlin' is not supported, only"),
    "mixed bits": (gptq_config(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic has '+:.*down.*': modules with settings"),
    "a pattern": (gptq_config(dynamic={"-:(": {}}), "dynamic: '(' is no pattern"),
    "unknown key": (gptq_config(rotation="hadamard"), "quantization_config.rotation='hadamard' is not supported"),
    "group": (gptq_config(group_size=0), "quantization_config.group_size=0: expected an integer in"),
    "awq gemv": (quantized_hf.AWQ | {"version": "gemv"}, "version='gemv' is not supported, only 'gemm'"),
    "awq, no zeros": (quantized_hf.AWQ | {"zero_point": False}, "zero_point=False is not supported, only True"),
    "awq, 8 bits": (quantized_hf.AWQ | {"bits": 8}, "bits=8 is not supported, only 4"),
    "fp8, static": (quantized_hf.FP8 | {"activation_scheme": "static"}, "activation_scheme='static' is not supported"),
    "fp8, ue8m0": (quantized_hf.FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported"),
    "fp8, block": (quantized_hf.FP8 | {"weight_block_size": [128]}, "weight_block_size=[128]: expected rows and"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quantization_config with quant_method='mxfp4' is not supported, only gptq,"),
    "no object": (["gptq"], "quantization_config with quant_method=['gptq'] is not supported"),
    "ct, nvfp4": (INT8 | {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported, only"),
    "ct, static": (
        quantized_hf.compressed("int-quantized", {}, {"strategy": "tensor", "dynamic": False}),
        "config_groups.group_0.input_activations.dynamic=False: expected true: static scales",
    ),
    "ct, 4 bits plain": (
        quantized_hf.compressed("int-quantized", {"num_bits": 4}),
        "group_0.weights: num_bits=4 of type 'int' as int-quantized is not supported",
    ),
    "ct, 4 bits and int8": (
        quantized_hf.compressed("pack-quantized", {"num_bits": 4}, quantized_hf.TOKEN),
        "input_activations.num_bits=8 of type 'int' is not supported beside int4 weights",
    ),
    "ct, two groups": (
        INT8 | {"config_groups": INT8["config_groups"] | {
            "group_1": quantized_hf.compressed("int-quantized", {})["config_groups"]["group_0"]}},
        "'group_1' is quantized otherwise than 'group_0': mixed bits",
    ),
    "ct, kv cache": (INT8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme=<object of 1 keys> is not"),
    "ct, sparse": (INT8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config="),
    "ct, no groups": (INT8 | {"config_groups": {}}, "config_groups=<object of 0 keys>: expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_schemes_that_are_not_served_are_refused_by_name(case, tmp_path):
    config, message = REFUSED[case]
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": config}
    write_folder(tmp_path, values, {})
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        HFCheckpoint(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")


def test_layouts_by_columns_and_missing_numbers(tmp_path):
    values = {**gptq_config()}
    folder, plain = write_pair("llama", values, gptq(), tmp_path)
    (plain / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="quantization_config says gptq, but no tensor is quantized"):
        HFCheckpoint(plain)


def test_info_has_it_in_short(tmp_path, capsys):
    from jaxserve.cli.app import run

    quantized, _ = write_pair(*SCHEMES["gptq, act-order"], tmp_path)
    assert run(["info", str(quantized)]) == 0
    assert "gptq: 16 of int4 with groups of 8, biases, act-order" in " ".join(capsys.readouterr().out.split())
    assert run(["info", str(quantized), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["quantization"]
    assert config["matrices"][0]["parameters"][0] == "layers.0.qkv"
