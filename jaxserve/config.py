"""Frozen configuration. Derived values are functions; nothing is edited after construction."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder is: families are flags of this one dataclass, never subclasses.

    Sizes are those of the checkpoint, before any padding for a mesh. ``eos_token_ids`` are the ids that end a
    generation unless the request says ``ignore_eos``.
    """

    family: Literal["llama"] = "llama"
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs")

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V that one token of context holds over all layers, ``itemsize`` bytes an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Mesh axis sizes, in the order of the mesh: ``("stage", "tensor")``."""

    stage: int = 1  # ST
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. ``allocation="static"`` reserves ``max_model_len`` a sequence: the benchmark's comparison."""

    num_pages: int  # NP
    page_size: int = 16  # PS, tokens
    prefix_caching: bool = True
    allocation: Literal["paged", "static"] = "paged"

    def __post_init__(self):
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size} must be at least 1")
        if self.num_pages < 1:
            raise ValueError(f"num_pages={self.num_pages} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine's scheduler.

    ``decode_sizes`` and ``prefill_sizes`` are the padded sizes a step may take (see ``step_io.Bucket``): ascending,
    the last decode size equal to ``max_num_seqs``. At most ``max_prefill_rows`` sequences have a prompt chunk in a
    step. ``batching="static"`` admits only into an empty batch: the benchmark's comparison.
    """

    max_model_len: int  # tokens, prompt and output together
    max_num_seqs: int  # R
    prefill_sizes: tuple[int, ...]  # prompt tokens a step, e.g. (64, 256)
    decode_sizes: tuple[int, ...]  # decode rows a step, e.g. (1, 8)
    max_prefill_rows: int = 4
    max_num_waiting: int = 1024
    lookahead: Literal[0, 1] = 1  # steps dispatched before the last one is read
    batching: Literal["continuous", "static"] = "continuous"

    def __post_init__(self):
        for name in ("prefill_sizes", "decode_sizes"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}={sizes} must be ascending positive sizes")
        if self.decode_sizes[-1] != self.max_num_seqs:
            raise ValueError(f"decode_sizes ends with {self.decode_sizes[-1]}, max_num_seqs={self.max_num_seqs}")
        if self.max_prefill_rows < 1 or self.max_num_waiting < 1 or self.max_model_len < 2:
            raise ValueError(
                f"max_prefill_rows={self.max_prefill_rows} and max_num_waiting={self.max_num_waiting} must be at "
                f"least 1, max_model_len={self.max_model_len} at least 2"
            )

    def max_pages_per_seq(self, page_size: int) -> int:
        """MP: pages that a sequence of ``max_model_len`` tokens holds."""
        return -(-self.max_model_len // page_size)
