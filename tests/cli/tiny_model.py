"""A GGUF file of a tiny random llama whose tokens are bytes (and "ab", for there must be a merge)."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from jaxserve.checkpoint.families import LLAMA, expected_shapes
from jaxserve.config import ModelConfig

EOS = 256
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    eos_token_ids=(EOS,),
)


def write_tiny_model(path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * EOS + [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    for name, shape in expected_shapes(LLAMA, CONFIG):
        scale = shape[-1] ** -0.5
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
