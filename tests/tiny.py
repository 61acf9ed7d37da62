"""A tiny model and tokenizer for tests: four layers, eight query and four kv heads, a vocabulary no mesh divides."""

import random
from functools import cache
from typing import Any

import jax
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.config import ModelConfig
from jaxserve.engine.engine import Engine
from jaxserve.model.params import Params, init_params
from jaxserve.text.tokenizer import Tokenizer
from tests import compiled

EOS = 0
CONFIG = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_ids=(EOS,),
)


@cache
def params() -> Params:
    return init_params(CONFIG, jax.random.key(7))


@cache
def tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Ids: 0 end of sequence, 1 a control token, 2 to 257 the bytes; the model's last id has no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(
        models.BPE(vocab={"<eos>": 0, "<ctl>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<ctl>"])
    return Tokenizer.from_backend(backend, eos_token_ids=(EOS,), chat_template=chat_template)


def engine(**options: Any) -> Engine:
    """An engine over the tiny model; small buckets, pages of 4 tokens."""
    defaults: dict[str, Any] = {
        "max_model_len": 96,
        "max_num_seqs": 4,
        "num_pages": 96,
        "page_size": 4,
        "prefill_sizes": (16,),
        "max_prefill_rows": 3,
        "compilation_cache_dir": compiled.FOLDER,
    }
    return Engine.from_params(CONFIG, params(), tokenizer(), **(defaults | options))


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens."""
    r = random.Random(seed)
    return [[r.randrange(2, CONFIG.vocab_size) for _ in range(r.randint(1, longest))] for _ in range(count)]
