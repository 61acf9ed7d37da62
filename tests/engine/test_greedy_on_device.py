"""Greedy tokens of a small model on a GPU: in float32 the CPU's, in bfloat16 by the kernels as by the references."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from benchmarks import greedy_tokens
from jaxserve.config import MatrixFormat, QuantizationConfig, QuantizedMatrices
from jaxserve.model.params import named_leaves, param_specs
from jaxserve.model.quantized import QUANTIZABLE

FORMATS = {
    "bfloat16": None,
    "int4 with zero points": MatrixFormat(kind="int4", group_size=128, has_bias=True),
    "int4 with whole zero points": MatrixFormat(kind="int4", group_size=128, has_bias=True, has_whole_zeros=True),
    "int8": MatrixFormat(kind="int8"),
}


def quantized(form: MatrixFormat | None):
    """The small model with every matrix of its layers in this format."""
    config = greedy_tokens.TINY
    if form is None:
        return config
    names = [name for name, _ in named_leaves(param_specs(config)) if name.startswith("layers.")]
    names = tuple(name for name in names if name.rpartition(".")[2] in QUANTIZABLE)
    assert names
    matrices = (QuantizedMatrices(format=form, parameters=names),)
    return replace(config, quantization=QuantizationConfig(method="test", matrices=matrices))


@pytest.mark.gpu
def test_float32_tokens_are_those_of_the_cpu():
    root, command = Path(__file__).parents[2], [sys.executable, "-m", "benchmarks.greedy_tokens"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as on_cpu:
        found = greedy_tokens.completions(dtype="float32")
        wanted = json.loads(on_cpu.communicate()[0])
    # Where two tokens were as good as each other, rounding would decide.
    assert min(gap for completion in wanted for gap in completion["gaps"]) > 1e-3
    assert [list(c.token_ids) for c in found] == [c["token_ids"] for c in wanted]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_kernels_agree_with_the_references(form):
    found = greedy_tokens.check(config=quantized(FORMATS[form]))
    assert found["ok"], found
    if jax.devices()[0].compute_capability.startswith("9."):
        assert "mosaic_gpu" in found["implementation"]


@pytest.mark.slow
def test_a_smaller_model_on_the_default_device(monkeypatch):
    """So that what is run on a GPU has been run."""
    small = replace(
        greedy_tokens.TINY, vocab_size=300, hidden_size=128, intermediate_size=128, num_layers=1, head_dim=16
    )
    monkeypatch.setattr(greedy_tokens, "TINY", small)
    monkeypatch.setattr(greedy_tokens, "PROMPT_LENS", (1, 17))
    found = greedy_tokens.float32_tokens()
    assert [len(c["token_ids"]) for c in found] == [len(c["gaps"]) for c in found] == [greedy_tokens.NUM_TOKENS] * 2
    assert min(gap for completion in found for gap in completion["gaps"]) >= 0
    checked = greedy_tokens.check(config=quantized(FORMATS["int4 with zero points"]))
    assert checked["ok"] and checked["equal_tokens"] == checked["tokens"] == 2 * greedy_tokens.NUM_TOKENS
    assert checked["implementation"] == ["reference"]
