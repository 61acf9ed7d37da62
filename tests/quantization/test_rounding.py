"""Models that are quantized here: what the folder holds, what it serves, and what cannot be."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.checkpoint import CheckpointError, open_checkpoint
from jaxserve.cli.app import run
from jaxserve.model.params import Params, TreeSource, named_leaves, param_specs
from jaxserve.quantization.checkpoint import RoundedSource
from jaxserve.quantization.convert import quantize
from jaxserve.quantization.recipe import quantized_config
from tests import tiny
from tests.checkpoint.live_checkpoint import LiveCheckpoint
from tests.checkpoint.tiny_gguf import write
from tests.oracle import oracle_logits

MATRICES = ("qkv", "attn_out", "gate_up", "down")


def live(**changes) -> LiveCheckpoint:
    return LiveCheckpoint(tiny.CONFIG, dataclasses.replace(tiny.params(), **changes), tiny.tokenizer())


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def plain_params(folder: Path) -> Params:
    """The dequantized parameters of a folder."""
    with open_checkpoint(folder, quantization="none") as c:
        specs = param_specs(c.config)
        values = {name: c.read(name, whole(spec.shape)) for name, spec in named_leaves(specs)}
    fields = [f.name for f in dataclasses.fields(specs.layers[0])]
    layers = tuple(
        dataclasses.replace(layer, **{f: values.get(f"layers.{i}.{f}") for f in fields})
        for i, layer in enumerate(specs.layers)
    )
    return Params(embed=values["embed"], layers=layers, final_norm=values["final_norm"], head=values.get("head"))


def logprobs(params: Params, ids: list[int]) -> np.ndarray:
    """Of each of ``ids`` but the first, by the oracle."""
    logits = oracle_logits(tiny.CONFIG, params, ids)[:-1]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("method, group, most", [("int8", None, 0.1), ("w8a8", None, 0.1), ("int4-rtn", 16, 1.0)])
def test_a_quantized_folder_is_near_the_model_and_smaller(method, group, most, tmp_path):
    seen = []
    folder = quantize(
        live(), tmp_path / "q", method=method, group_size=group, on_progress=lambda *step: seen.append(step)
    )
    with open_checkpoint(folder) as c:
        assert c.config.quantization is not None and c.config.quantization.method == method
        num_arrays = sum(1 for _ in named_leaves(param_specs(c.config)))
        assert c.tensor_types()["int8" if group is None else "uint8"] == sum(
            np.asarray(getattr(layer, m)).size // (1 if group is None else 2)
            for layer in tiny.params().layers
            for m in MATRICES
        )
        np.testing.assert_array_equal(c.read("embed", whole((259, 32))), tiny.params().embed)
    assert seen[0] == ("convert", 0, num_arrays) and seen[-1] == ("convert", num_arrays, num_arrays)
    ids = tiny.prompts(1, seed=3, longest=24)[0]
    dequantized = logprobs(plain_params(folder), ids)
    assert 0 < np.abs(dequantized - logprobs(tiny.params(), ids)).max() < most
    if method == "int4-rtn":
        options = {"max_model_len": 32, "max_num_seqs": 1, "num_pages": 8, "page_size": 4, "prefill_sizes": (32,)}
        with Engine.from_pretrained(str(folder), max_prefill_rows=1, samplings=("any",), **options) as engine:
            (scored,) = engine.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        assert scored.prompt_logprobs is not None
        got = [entry.logprob for entry in scored.prompt_logprobs if entry is not None]
        np.testing.assert_allclose(got, dequantized, atol=2e-4)


@pytest.mark.parametrize("method, group", [("int8", None), ("int4-rtn", 8)])
def test_parts_are_those_of_the_whole_and_half_a_step_from_the_weights(method, group):
    config = quantized_config(tiny.CONFIG, method, group)
    source = RoundedSource(TreeSource(tiny.params(), tiny.CONFIG).read, config)
    leaves = {n: source.read(n, whole(s.shape)) for n, s in named_leaves(param_specs(config)) if ".down" in n}
    for name, values in leaves.items():
        part = (slice(5, 9), *(slice(n // 2, n) if n > 1 else slice(0, 1) for n in values.shape[1:]))
        np.testing.assert_array_equal(source.read(name, part), values[part], err_msg=name)
    q, scale = leaves["layers.1.down.q"], leaves["layers.1.down.scale"]
    if method == "int8":
        values = q * scale
    else:
        numbers = np.stack([q & 15, q >> 4], -1).reshape(32, -1, 8)
        values = (numbers * scale[..., None] + leaves["layers.1.down.bias"][..., None]).reshape(32, 48)
    error = np.abs(values - tiny.params().layers[1].down).reshape(*scale.shape, -1)
    most = 0.5001 if method == "int8" else 0.508  # an int4's scale is a float16: 15 steps are 15 / 2**11 off at most
    assert (error <= scale[..., None] * most).all() and error.max() > 0.4 * scale.max()


def test_what_cannot_be_quantized_is_refused(tmp_path):
    def refused(message: str, source=None, **options):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            quantize(source or live(), tmp_path / "no", **options)
        assert not (tmp_path / "no" / "jaxserve.json").exists()

    refused("params.layers.0.qkv: group_size=20 does not divide its 32 input columns", method="int4-rtn", group_size=20)
    refused("none of the groups 128, 64, 32 divides its 48 input columns", method="int4-rtn")
    refused("group_size=3: MatrixFormat.group_size=3 must be even and positive", method="int4-rtn", group_size=3)
    refused("group_size=16: quantize='int8' has a scale a row, no groups", method="int8", group_size=16)
    refused("quantize='int3' is not one of int8, w8a8, int4-rtn", method="int3")
    folder = quantize(live(), tmp_path / "q", method="int8")
    refused("the model is quantized already (int8)", folder, method="int4-rtn", group_size=16)
    with pytest.raises(CheckpointError, match=r"has the checkpoint live .* from other files; asked was"):
        quantize(live(), folder, method="w8a8")
    layer = tiny.params().layers[2]
    down = np.array(layer.down)
    down[3, 5] = np.nan
    layers = (*tiny.params().layers[:2], dataclasses.replace(layer, down=down), tiny.params().layers[3])
    refused("parameter layers.2.down: 1 of 1536 values are not finite", live(layers=layers), method="int8")


def test_the_command(tmp_path, capsys):
    source, out = str(write(tmp_path / "tiny.gguf")), str(tmp_path / "out")
    assert run(["convert", source, out, "--quantize", "int8", "--dtype", "bfloat16"]) == 0
    with open_checkpoint(out) as c:
        assert c.config.quantization is not None and set(c.tensor_types()) == {"int8", "float32", "bfloat16"}
    for arguments, message in (
        (["--group-size", "32"], "group_size=32 is of --quantize, which is not given"),
        (["--symmetric"], "symmetric is of --quantize, which is not given"),
        (["--quantize", "int8", "--format", "safetensors"], "did not come from a Hugging Face folder"),
        (["--quantize", "int2"], "quantize='int2' is not one of int8"),
    ):
        assert run(["convert", source, str(tmp_path / "no"), *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
