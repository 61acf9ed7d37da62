"""The real default model: its header, its tokenizer and its weights, against independent readings of the same file."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.checkpoint import DEFAULT_MODEL, CheckpointInfo, GGUFCheckpoint, checkpoint_info, resolve_model
from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.model.params import Params, check_params
from jaxserve.text.detokenizer import IncrementalDetokenizer
from tests.checkpoint.tiny_gguf import read_params

REFERENCE = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"


@cache
def checkpoint() -> GGUFCheckpoint:
    return GGUFCheckpoint(resolve_model(DEFAULT_MODEL))


@cache
def params() -> Params:
    return read_params(checkpoint())


@cache
def reference() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


@cache
def gguf_tensors() -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(resolve_model(DEFAULT_MODEL)).tensors}


def test_config():
    assert checkpoint().config == ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ropes=(RopeConfig(theta=100_000.0),),
        norm_eps=float(np.float32(1e-5)),
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_ids=(2,),
    )


def test_info():
    info = checkpoint_info(checkpoint())
    assert info == CheckpointInfo(
        model_name="Smollm2 135M 8k Lc100K Mix1 Ep2",
        path=str(resolve_model(DEFAULT_MODEL)),
        architecture="llama",
        license="apache-2.0",
        num_params=134_515_008,
        num_bytes=98_362_432,
        tensor_bytes={"Q4_1": 66_355_200, "Q8_0": 30_081_024, "F32": 140_544},
        kv_bytes_per_token_f32=46_080,
        kv_bytes_per_token_bf16=23_040,
        kv_context_len=8192,
        kv_batch=1,
        kv_bytes_f32=46_080 * 8192,
        kv_bytes_bf16=23_040 * 8192,
        context_len=8192,
        vocab_size=49152,
        eos_token_ids=(2,),
        sampling_defaults={},
        has_chat_template=True,
        tokenizer_error=None,
    )


def test_every_tensor_is_where_gguf_s_own_reader_finds_it():
    theirs = {n: (tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for n, t in gguf_tensors().items()}
    assert {n: (t.shape, t.start, t.num_bytes) for n, t in checkpoint().tensors.items()} == theirs


def test_params_have_the_shapes_of_the_config():
    check_params(params(), checkpoint().config)
    assert params().head is None
    assert {a.dtype for a in (params().embed, params().layers[0].qkv, params().layers[29].gate_up)} == {np.dtype("f4")}


@pytest.mark.parametrize(("parameter", "heads"), [("attn_q", 9), ("attn_k", 3)])
def test_q_and_k_rows_are_put_back_in_half_split_order(parameter, heads):
    tensor = gguf_tensors()[f"blk.17.{parameter}.weight"]
    stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(heads, 64, 576)
    half_split = np.concatenate([stored[:, 0::2], stored[:, 1::2]], axis=1)  # even rows, then odd ones
    qkv = params().layers[17].qkv  # [K, G + 2, H, D]
    ours = qkv[:, :3].reshape(heads, 64, 576) if parameter == "attn_q" else qkv[:, 3]
    np.testing.assert_array_equal(ours, half_split)


def test_quantized_matrices_are_dequantized_block_by_block():
    layer, tensors = params().layers[3], gguf_tensors()
    pairs = {"blk.3.ffn_up.weight": layer.gate_up[1], "blk.3.ffn_down.weight": layer.down}
    for name, ours in pairs.items():  # Q4_1: f16 scale, f16 minimum, 16 bytes of low then high nibbles
        blocks = tensors[name].data.reshape(-1, 20)
        scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        np.testing.assert_array_equal(ours.reshape(-1, 32), nibbles * scale + minimum)
    blocks = tensors["token_embd.weight"].data.reshape(-1, 34)[:1000]  # Q8_0: f16 scale, 32 signed bytes
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(params().embed.reshape(-1, 32)[:1000], blocks[:, 2:].view(np.int8) * scale)


def test_the_reference_was_made_from_this_file():
    assert hashlib.sha256(resolve_model(DEFAULT_MODEL).read_bytes()).hexdigest() == reference()["model_sha256"]


@pytest.mark.parametrize("prompt", reference()["prompts"], ids=lambda p: p["name"])
def test_text_and_ids_agree_with_transformers(prompt):
    tokenizer = checkpoint().tokenizer()
    assert tokenizer.encode(prompt["text"]) == prompt["prompt_token_ids"]
    if prompt["messages"] is not None:
        assert tokenizer.render_chat(prompt["messages"]) == prompt["text"]
        assert tokenizer.encode_chat(prompt["messages"]) == prompt["prompt_token_ids"]
    assert tokenizer.decode(prompt["new_token_ids"]) == prompt["new_text"]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
    streamed = [detokenizer.add(i) for i in prompt["new_token_ids"]]
    assert "".join(streamed) + detokenizer.flush() == prompt["new_text"]
