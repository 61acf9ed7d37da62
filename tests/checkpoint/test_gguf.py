"""GGUF checkpoints: layout of the loaded tree, and refusal by name of everything that is not understood."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError, GGUFCheckpoint, checkpoint_info
from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.model.params import check_params
from tests.checkpoint.tiny_gguf import LAYERS, D, F, H, K, N, V, read_params, weights, write


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_config_is_read_from_the_metadata(tiny_file):
    checkpoint = GGUFCheckpoint(tiny_file)
    assert checkpoint.config == ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=LAYERS,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        ropes=(RopeConfig(theta=5000.0),),
        norm_eps=float(np.float32(1e-5)),
        tie_word_embeddings=True,
        max_position_embeddings=64,
        eos_token_ids=checkpoint.tokenizer().eos_token_ids,
    )
    assert (checkpoint.architecture, checkpoint.model_name, checkpoint.license) == ("llama", "tiny", "apache-2.0")


def test_absent_keys_have_the_format_s_defaults(tmp_path):
    absent = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size")
    keys = {f"llama.{k}": None for k in absent} | {"general.name": None, "general.license": None}
    tensors = weights()
    for name in tensors:
        if "attn_k" in name or "attn_v" in name:
            tensors[name] = np.zeros((N * H, D), np.float32)
    checkpoint = GGUFCheckpoint(write(tmp_path / "some-name.gguf", keys=keys, tensors=tensors))
    config = checkpoint.config
    assert (config.num_kv_heads, config.ropes[0].theta, config.head_dim, config.vocab_size) == (N, 10_000.0, D // N, V)
    assert (checkpoint.model_name, checkpoint.license) == ("some-name", None)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """By definition: row (pair i, side s) of a head moves from 2 i + s to s H/2 + i."""
    out = np.empty((heads, H, D), np.float32)
    for head in range(heads):
        for i in range(H // 2):
            for side in range(2):
                out[head, side * (H // 2) + i] = rows[head * H + 2 * i + side]
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_params_have_the_canonical_layout(tmp_path, tied):
    given = weights(tied)
    with GGUFCheckpoint(write(tmp_path / "m.gguf", tensors=given)) as checkpoint:
        params = read_params(checkpoint)
        config = checkpoint.config
    check_params(params, config)
    assert config.tie_word_embeddings == tied
    np.testing.assert_array_equal(params.embed, given["token_embd.weight"])
    np.testing.assert_array_equal(params.final_norm, given["output_norm.weight"])
    if tied:
        assert params.head is None
    else:
        np.testing.assert_array_equal(params.head, given["output.weight"])
    for i, layer in enumerate(params.layers):
        blk = {name.split(".")[2]: a for name, a in given.items() if name.startswith(f"blk.{i}.")}
        q, k = half_split(blk["attn_q"], N), half_split(blk["attn_k"], K)
        v = blk["attn_v"].reshape(K, H, D)
        for head in range(N):  # query head n reads kv head n // G
            np.testing.assert_array_equal(layer.qkv[head // (N // K), head % (N // K)], q[head])
        np.testing.assert_array_equal(layer.qkv[:, N // K], k)
        np.testing.assert_array_equal(layer.qkv[:, N // K + 1], v)
        np.testing.assert_array_equal(layer.gate_up, np.stack([blk["ffn_gate"], blk["ffn_up"]]))
        np.testing.assert_array_equal(layer.attn_out, blk["attn_output"])
        np.testing.assert_array_equal(layer.down, blk["ffn_down"])
        np.testing.assert_array_equal(layer.attn_norm, blk["attn_norm"])
        np.testing.assert_array_equal(layer.mlp_norm, blk["ffn_norm"])


def test_params_do_not_depend_on_the_open_file(tiny_file):
    with GGUFCheckpoint(tiny_file) as checkpoint:
        params = read_params(checkpoint)
    np.testing.assert_array_equal(params.embed, weights()["token_embd.weight"])  # even views of the mapped file
    with pytest.raises(CheckpointError, match="is closed"):
        read_params(checkpoint)
    assert checkpoint.config.vocab_size == V
    assert checkpoint.tokenizer().vocab_size == V


def test_info_counts_what_the_file_holds(tiny_file):
    info = checkpoint_info(GGUFCheckpoint(tiny_file))
    assert info.num_params == sum(a.size for a in weights().values())
    assert info.tensor_bytes == {"F32": 4 * info.num_params}
    assert (info.kv_bytes_per_token_f32, info.kv_bytes_per_token_bf16) == (
        2 * LAYERS * K * H * 4,
        2 * LAYERS * K * H * 2,
    )
    assert (info.num_bytes, info.context_len, info.vocab_size) == (tiny_file.stat().st_size, 64, V)
    assert not info.has_chat_template


def test_the_header_says_what_gguf_s_own_reader_says(tmp_path):
    keys = {
        "general.languages": ["en", "日本"],
        "x.floats": [0.5, 2.0],
        "x.flags": [True, False],
        "tokenizer.chat_template": "é",
    }
    path = write(tmp_path / "m.gguf", keys=keys, types={"token_embd.weight": gguf.GGMLQuantizationType.Q8_0})
    ours, theirs = GGUFCheckpoint(path), gguf.GGUFReader(path)
    their_keys = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()} == their_keys
    assert [(t.name, t.shape, t.type_name, t.start, t.num_bytes) for t in ours.tensors.values()] == [
        (t.name, tuple(t.shape[::-1].tolist()), t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.original_context_length is missing"),
        ({"llama.rope.scaling.type": 4}, "metadata llama.rope.scaling.type=4 is not supported, only none, linear"),
        ({"llama.rope.scaling.factor": -8.0}, "llama.rope.scaling.factor=-8.0 must be a positive number"),
        ({"llama.attention.clamp_kqv": 8.0}, "metadata 'llama.attention.clamp_kqv'=8.0 is not supported"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "'blk.0.ffn_gate_inp.weight' is missing"),
        ({"llama.attention.sliding_window": 8.5}, "sliding_window=8.5 must be an integer of at least 0"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count=<array of 2> must be a positive integer"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 0}, "llama.block_count=0 must be a positive integer"),
        ({"llama.block_count": 3}, r"tensor 'blk.2.attn_norm.weight' is missing, expected shape \(32,\)"),
        ({"llama.block_count": 2**32 - 1}, "block_count=4294967295 cannot be: the file has only 20 tensors"),
        ({"llama.block_count": 1}, r"tensor 'blk.1.attn_norm.weight' of shape \(32,\) is not one of this llama model"),
        ({"llama.embedding_length": 64}, "rope.dimension_count=8 is not 16, the head dimension"),
        ({"llama.feed_forward_length": 48}, r"'blk.0.ffn_gate.weight' has shape \(32, 32\), expected \(48, 32\)"),
        ({"llama.vocab_size": 300}, r"'token_embd.weight' has shape \(266, 32\), expected \(300, 32\)"),
        ({"llama.attention.head_count_kv": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 is not 8, the head dimension"),
        ({"llama.attention.key_length": 16}, "rope.dimension_count=8 is not 16, the head dimension"),
        ({"llama.rope.freq_base": float("nan")}, "rope.freq_base=nan must be a positive number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": "1"}, "layer_norm_rms_epsilon='1' must be a positive number"),
        ({"llama.something.new": 1}, "metadata 'llama.something.new'=1 is not supported"),
        ({"llama.new\nkey": "a\nb"}, r"metadata 'llama\.new\\nkey'='a\\nb' is not supported"),
        ({"general.type": "adapter"}, "general.type='adapter' is not a model"),
        ({"split.count": 4}, "split.count=4"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "end-of-sequence ids"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, keys, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(write(tmp_path / "m.gguf", keys=keys))


@pytest.mark.parametrize(
    "keys", [{"llama.rope.scaling.type": "none"}, {"llama.expert_count": 0}, {"x.y": 1}, {"split.count": 1}]
)
def test_keys_that_change_nothing_are_taken(tmp_path, keys):
    assert GGUFCheckpoint(write(tmp_path / "m.gguf", keys=keys)).config.vocab_size == V


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported, only llama"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", arch="mamba"))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("rope_freqs.weight", r"'rope_freqs.weight' has shape \(3,\), expected \(4,\)"),
        ("blk.0.attn_q.bias", r"'blk.0.attn_q.bias' has shape \(3,\), expected \(32,\)"),
        ("blk.1.attn_q.bias", r"'blk.1.attn_q.bias' of shape \(3,\) is not one of this llama model"),
        ("blk.0.attn_rot_embd.weight", r"'blk.0.attn_rot_embd.weight' of shape \(3,\) is not one of this llama"),
    ],
)
def test_an_extra_tensor_is_refused_by_name(tmp_path, name, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors={**weights(), name: np.ones(3, np.float32)}))


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors = weights()
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        GGUFCheckpoint(write(tmp_path / "m.gguf", tensors=tensors, keys={"llama.vocab_size": V}))


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    tensors = {n: a.astype(np.int32) if n == "output_norm.weight" else a for n, a in weights().items()}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors=tensors))
    with pytest.raises(CheckpointError, match=r"tensor 'output_norm\.weight' of type I32 cannot be read"):
        read_params(checkpoint)


def test_a_tokenizer_error_names_the_file(tmp_path):
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", keys={"tokenizer.ggml.model": "rwkv"}))
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.model 'rwkv' is not supported"):
        checkpoint.tokenizer()


def test_without_the_gguf_package_opening_says_what_to_install(tiny_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        GGUFCheckpoint(tiny_file)
