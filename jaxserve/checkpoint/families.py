"""GGUF architectures as data: which metadata keys and tensors a family has, and where they go in our tree."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.config import ModelConfig

OUTPUT = "output.weight"  # absent where the embedding is tied


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """One architecture.

    Attributes:
        architecture: ``general.architecture``, the prefix of its metadata keys.
        family: ``ModelConfig.family``.
        sizes: metadata key (after the architecture's name) -> integer field of ``ModelConfig``.
        numbers: metadata key -> float field; ``default_numbers`` has what an absent key means.
        head_dim_keys: each, where present, equals the head dimension (the first one sets it).
        neutral: keys whose given values change nothing; any other value is refused by name.
        top, layer: our parameter -> tensor name, in load order; layer names follow ``blk.{i}.``.
        interleaved_rope: q and k rows are stored with rotary pairs side by side (2i, 2i + 1) and must be put back to
            the half-split order (i, i + H/2).
    """

    architecture: str
    family: Literal["llama"]
    sizes: dict[str, str]
    numbers: dict[str, str]
    default_numbers: dict[str, float]
    head_dim_keys: tuple[str, ...]
    neutral: dict[str, tuple[Any, ...]]
    top: dict[str, str]
    layer: dict[str, str]
    interleaved_rope: bool


LLAMA = GGUFFamily(
    architecture="llama",
    family="llama",
    sizes={
        "block_count": "num_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_heads",
        "attention.head_count_kv": "num_kv_heads",
        "vocab_size": "vocab_size",
    },
    numbers={"rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "norm_eps"},
    default_numbers={"rope.freq_base": 10_000.0},
    head_dim_keys=("attention.key_length", "attention.value_length", "rope.dimension_count"),
    neutral={
        "rope.scaling.type": ("none",),
        "rope.scale_linear": (1.0,),
        "rope.scaling.factor": (0.0, 1.0),
        "expert_count": (0,),
        "expert_used_count": (0,),
    },
    top={"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": OUTPUT},
    layer={
        "attn_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "attn_out": "attn_output.weight",
        "mlp_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
    },
    interleaved_rope=True,
)

FAMILIES: dict[str, GGUFFamily] = {f.architecture: f for f in (LLAMA,)}


def layer_tensor(family: GGUFFamily, layer: int, parameter: str) -> str:
    """Name of the tensor that holds a layer's ``parameter`` (q, k, v, gate and up separately)."""
    return f"blk.{layer}.{family.layer[parameter]}"


def expected_shapes(family: GGUFFamily, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and row-major shape of every tensor that a checkpoint of this config has.

    Lazy: a corrupt layer count must not cost memory before the first missing tensor is found.
    """
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "embed": (v, d), "final_norm": (d,), "head": (v, d), "attn_norm": (d,), "q": (q, d), "k": (kv, d),
        "v": (kv, d), "attn_out": (d, q), "mlp_norm": (d,), "gate": (f, d), "up": (f, d), "down": (d, f),
    }  # fmt: skip
    for parameter, name in family.top.items():
        if parameter != "head" or not config.tie_word_embeddings:
            yield name, shapes[parameter]
    for i in range(config.num_layers):
        for parameter in family.layer:
            yield layer_tensor(family, i, parameter), shapes[parameter]
