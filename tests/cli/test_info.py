"""The ``info`` command on what is not a GGUF file (``test_local`` has that)."""

import json
from pathlib import Path

import pytest

from jaxserve.cli.app import run
from tests.checkpoint.tiny_hf import llama, write_folder


def test_info_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, tensors, ours = llama()
    folder = write_folder(tmp_path / "tiny-llama", config, tensors, shards=2)
    assert run(["info", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["model_name"], values["architecture"]) == ("tiny-llama", "LlamaForCausalLM")
    assert values["num_params"] == sum(x.size for x in ours.values())
    assert values["tensor_bytes"] == {"F32": 4 * values["num_params"]}
    assert values["num_bytes"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert (values["kv_context_len"], values["kv_batch"]) == (64, 1)


def test_info_of_a_bare_config_for_a_context_and_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(llama()[0]))
    assert run(["info", str(tmp_path), "--context", "10", "--batch", "3", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kv_bytes_per_token_bf16"] == 2 * 2 * 2 * 4 * 2  # K and V, layers, kv heads, head_dim, bytes
    assert values["kv_bytes_bf16"] == 30 * values["kv_bytes_per_token_bf16"]
    assert run(["info", str(tmp_path), "--context", "0"]) == 2
    assert "context_len=0 and batch=1 must be at least 1" in capsys.readouterr().err
    assert run(["generate", str(tmp_path), "-p", "a"]) == 2
    assert capsys.readouterr().err
