"""Hugging Face folders: every parameter and every part of one is exactly what the file's tensors say."""

import json
import random
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxserve.checkpoint import CheckpointError, HFCheckpoint, checkpoint_info, open_checkpoint, resolve_model
from jaxserve.model.params import named_leaves, param_specs
from tests.checkpoint.tiny_hf import CASES, V, llama, mixtral, phi3, safetensors, write_folder


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_and_any_part_of_it_is_exact(tmp_path, name):
    config, tensors, ours = CASES[name]()
    r = random.Random(name)
    with HFCheckpoint(write_folder(tmp_path, config, tensors, shards=r.choice([0, 3]))) as checkpoint:
        specs = dict(named_leaves(param_specs(checkpoint.config)))
        assert {n: s.shape for n, s in specs.items()} == {n: x.shape for n, x in ours.items()}
        for parameter, expected in ours.items():
            read = checkpoint.read(parameter, whole(expected.shape))
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected, parameter)
            for _ in range(4):
                ends = [sorted(r.sample(range(n + 1), 2)) for n in expected.shape]
                index = tuple(slice(*e) for e in ends)
                np.testing.assert_array_equal(checkpoint.read(parameter, index), expected[index], parameter)
        assert checkpoint.num_params == sum(x.size for x in ours.values())
        dtypes = {"BF16" if "bfloat16" in name else "F32"}
        assert set(checkpoint.tensor_types()) - {"BOOL"} == dtypes
        assert sum(checkpoint.tensor_types().values()) == sum(x.nbytes for x in tensors.values())


def test_what_is_read_is_a_copy_that_outlives_the_file(tmp_path):
    config, tensors, ours = llama()
    checkpoint = HFCheckpoint(write_folder(tmp_path, config, tensors))
    embed = checkpoint.read("embed", whole(ours["embed"].shape))
    checkpoint.close()
    embed[0, 0] += 1  # writable
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("embed", whole(ours["embed"].shape))
    assert checkpoint.config.vocab_size == V


def test_threads_may_read_at_once(tmp_path):
    config, tensors, ours = mixtral()
    failures = []
    with HFCheckpoint(write_folder(tmp_path, config, tensors, shards=2)) as checkpoint:

        def read_all() -> None:
            for name, x in ours.items():
                if not np.array_equal(checkpoint.read(name, whole(x.shape)), x):
                    failures.append(name)

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("dtypes", "read"),
    [(("f8", "f8", "f8"), "f4"), (("f2", "f2", "f2"), "f2"), (("f4", "f2", "f2"), "f4"), (("f2", "f8", "f4"), "f4")],
)
def test_float_types_that_differ_or_are_wide_are_read_as_float32(tmp_path, dtypes, read):
    config, tensors, ours = llama()
    for letter, dtype in zip("qkv", dtypes):
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        tensors[name] = tensors[name].astype(np.float16).astype(dtype)
    expected = ours["layers.1.qkv"].astype(np.float16)
    with HFCheckpoint(write_folder(tmp_path, config, tensors)) as checkpoint:
        values = checkpoint.read("layers.1.qkv", whole(expected.shape))
    assert values.dtype == np.dtype(read)
    np.testing.assert_array_equal(values, expected)


def test_tensors_need_no_alignment(tmp_path):
    config, tensors, ours = llama(jnp.bfloat16)
    write_folder(tmp_path, config, tensors)
    for pad in range(3):
        (tmp_path / "model.safetensors").write_bytes(safetensors(tensors, pad=pad))
        with HFCheckpoint(tmp_path) as checkpoint:
            np.testing.assert_array_equal(checkpoint.read("layers.0.down", whole((12, 10))), ours["layers.0.down"])


def test_only_what_is_asked_for_is_touched(tmp_path):
    """A part of a large tensor costs memory of its own size."""
    import tracemalloc

    config, tensors, _ = phi3()
    config["vocab_size"] = 40_000
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.zeros((40_000, 12), np.float32)
    with HFCheckpoint(write_folder(tmp_path, config, tensors)) as checkpoint:
        tracemalloc.start()
        checkpoint.read("embed", (slice(7, 9), slice(0, 12)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000


def test_ignored_tensors_are_those_that_say_nothing(tmp_path):
    config, tensors, ours = llama()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    config["tie_word_embeddings"] = True
    with HFCheckpoint(write_folder(tmp_path, config, tensors)) as checkpoint:  # lm_head is a copy of the embedding
        assert checkpoint.num_params == sum(x.size for n, x in ours.items() if n != "head")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' has shape \(18, 12\), the tied embedding \(19, 12\)"):
        HFCheckpoint(write_folder(tmp_path, config, tensors))


def test_tensors_without_elements_are_ignored(tmp_path):
    """Transformers saves a shared expert of no columns where n_shared_experts is 0."""
    config, tensors, _ = llama()
    tensors["model.layers.0.mlp.shared_experts.down_proj.weight"] = np.ones((12, 0), np.float32)
    HFCheckpoint(write_folder(tmp_path, config, tensors)).close()


def test_a_drafting_layer_is_ignored_up_to_their_number(tmp_path):
    config, tensors, _ = CASES["deepseek_v3"]()
    HFCheckpoint(write_folder(tmp_path, config, tensors)).close()
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.2.eh_proj.weight' of shape \(12, 24\) is not one"):
        HFCheckpoint(write_folder(tmp_path, config | {"num_nextn_predict_layers": 0}, tensors))


@pytest.mark.parametrize(
    ("generation", "eos", "defaults"),
    [
        (None, (2,), {}),
        ({"eos_token_id": 5}, (2, 5), {}),
        ({"eos_token_id": [7, 2, 5]}, (2, 7, 5), {}),
        ({"eos_token_id": None, "temperature": None, "max_length": 20}, (2,), {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05},
            (2,),
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05},
        ),
        ({"min_p": 0.1}, (2,), {"min_p": 0.1}),
    ],
)
def test_generation_config(tmp_path, generation, eos, defaults):
    config, tensors, _ = llama()
    write_folder(tmp_path, config | {"eos_token_id": 2}, tensors)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with HFCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == eos
        assert checkpoint.sampling_defaults == defaults


@pytest.mark.parametrize(
    ("generation", "complaint"),
    [
        ('{"eos_token_id": "</s>"}', r"eos_token_id='</s>': expected token ids"),
        ('{"temperature": "hot"}', r"generation_config.json: temperature='hot' is not a number"),
        ('{"top_k": 2.5}', r"generation_config.json: top_k=2.5 is not an integer"),
        ('{"top_p": true}', r"generation_config.json: top_p=True is not a number"),
        ("[]", r"generation_config.json is not a JSON object but \[\]"),
    ],
)
def test_a_malformed_generation_config_is_named(tmp_path, generation, complaint):
    config, tensors, _ = llama()
    write_folder(tmp_path, config, tensors)
    (tmp_path / "generation_config.json").write_text(generation)
    with pytest.raises(CheckpointError, match=complaint):
        HFCheckpoint(tmp_path)


def with_tokenizer(folder: Path, num_extra: int = 0) -> Path:
    """``folder`` with 12 letters as its vocabulary, and ``num_extra`` more."""
    letters = {c: i for i, c in enumerate("abcdefghijkl" + "mnopqrstuvwxyz"[:num_extra])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    return folder


def test_the_tokenizer_lies_beside_the_tensors(tmp_path):
    config, tensors, _ = llama()
    folder = write_folder(tmp_path, config | {"eos_token_id": 3}, tensors)
    with HFCheckpoint(folder) as checkpoint:
        assert checkpoint.tokenizer() is None
        info = checkpoint_info(checkpoint)
        assert (info.has_chat_template, info.tokenizer_error) == (False, None)
    with HFCheckpoint(with_tokenizer(folder)) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None
        assert (tokenizer.encode("abba"), tokenizer.eos_token_ids) == ([0, 1, 1, 0], (3,))
        info = checkpoint_info(checkpoint)
        assert (info.has_chat_template, info.tokenizer_error) == (True, None)


def test_a_broken_tokenizer_is_told_and_leaves_the_other_facts(tmp_path):
    config, tensors, _ = llama()
    folder = with_tokenizer(write_folder(tmp_path, config, tensors), num_extra=8)
    with HFCheckpoint(folder) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None and tokenizer.vocab_size == V + 1  # more than the embedding: the engine looks
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError) as error:
            checkpoint.tokenizer()
        assert str(error.value).count(str(folder)) == 1
        info = checkpoint_info(checkpoint)
        assert (info.tokenizer_error, info.has_chat_template, info.vocab_size) == (str(error.value), False, V)


def test_name_and_license(tmp_path):
    config, tensors, _ = llama()
    folder = write_folder(tmp_path / "my-model", config, tensors)
    assert (HFCheckpoint(folder).model_name, HFCheckpoint(folder).license) == ("my-model", None)
    (folder / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# x\nlicense: mit\n")
    assert HFCheckpoint(folder).license == "apache-2.0"
    snapshot = tmp_path / "models--org--tiny-llama" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    assert HFCheckpoint(write_folder(snapshot, config, tensors)).model_name == "org/tiny-llama"


def test_one_door_opens_folders(tmp_path):
    config, tensors, _ = llama()
    folder = write_folder(tmp_path / "hf", config, tensors)
    assert resolve_model(folder) == folder
    with open_checkpoint(str(folder)) as checkpoint:
        assert isinstance(checkpoint, HFCheckpoint) and checkpoint.architecture == "LlamaForCausalLM"
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match=f"{file} is not a .gguf file: give the folder"):
            open_checkpoint(folder / file)
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model(folder) == folder
    (folder / "model.safetensors").unlink()
    assert resolve_model(folder) == folder / "model.gguf"


LLAMA3_70B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 28672, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def test_info_of_a_bare_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_70B))
    with open_checkpoint(tmp_path, allow_bare=True) as checkpoint:
        info = checkpoint_info(checkpoint, context_len=8192, batch=16)
        assert info.kv_bytes_per_token_bf16 == 327_680
        assert info.kv_bytes_bf16 == 327_680 * 8192 * 16 and info.kv_bytes_f32 == 2 * info.kv_bytes_bf16
        assert info.num_params == 70_553_706_496  # as the model's card says
        assert (info.num_bytes, info.tensor_bytes, info.tokenizer_error) == (0, {}, None)
        assert (info.context_len, info.eos_token_ids) == (131_072, (128001, 128008, 128009))
        with pytest.raises(CheckpointError, match=r"has no tensors, only a config\.json"):
            checkpoint.read("embed", (slice(0, 1), slice(0, 8192)))
        with pytest.raises(ValueError, match="context_len=0 and batch=1 must be at least 1"):
            checkpoint_info(checkpoint, context_len=0)
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        open_checkpoint(tmp_path)
