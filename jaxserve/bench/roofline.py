"""The least a step can take: its bytes and arithmetic, counted from the model and the batch, over measured rates.

The roofline model is Williams, Waterman and Patterson's (2009): the longer of the two is the floor. Counted is what no
implementation can leave out: every weight that the step's tokens need, once; K and V of each row's context, once; the
logits, once. Activations are not counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from jaxserve.bench.ceilings import Ceilings
from jaxserve.cache.pages import kv_bytes_per_token
from jaxserve.config import CacheDtype, ModelConfig
from jaxserve.model.params import named_leaves, param_specs

LOGIT_BYTES = 4  # f32


class Row(Protocol):
    """One sequence's part of a step: ``num_new_tokens`` from position ``start`` (``scheduler.batch.ScheduledRow``)."""

    @property
    def start(self) -> int: ...
    @property
    def num_new_tokens(self) -> int: ...
    @property
    def samples(self) -> bool: ...


class PlainRow(NamedTuple):
    """A ``Row`` made by hand."""

    start: int
    num_new_tokens: int
    samples: bool = True


class Work(NamedTuple):
    """What a step has to read, and to calculate."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Roofline:
    """Floors of steps of one model on ``num_devices`` devices that share its work evenly.

    Attributes:
        itemsize: bytes of an element of weights.
        dense_params: weights that every token is multiplied with, all layers.
        expert_params: of one expert, summed over the layers with experts.
        head_params: of the product that gives logits; a tied embedding is read as the head.
        dense_bytes, expert_bytes, head_bytes: of the same, as they are kept (quantized, or ``itemsize`` each).
        kv_bytes: of one token of context, all layers.
    """

    config: ModelConfig
    itemsize: int
    ceilings: Ceilings
    num_devices: int
    dense_params: int
    expert_params: int
    head_params: int
    dense_bytes: int
    expert_bytes: int
    head_bytes: int
    kv_bytes: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        itemsize: int,
        ceilings: Ceilings,
        num_devices: int = 1,
        cache_dtype: CacheDtype = "auto",
    ) -> "Roofline":
        plain = dataclasses.replace(config, quantization=None)
        num_experts = 1 if config.moe is None else config.moe.num_experts
        sums = []
        for specs, kept in ((param_specs(plain), False), (param_specs(config), True)):
            dense = experts = head = 0
            for name, spec in named_leaves(specs):
                field = name.split(".")[2 if name.startswith("layers.") else 0]
                size = math.prod(spec.shape)
                if kept:
                    size *= jnp.dtype(spec.dtype).itemsize if spec.dtype else itemsize
                if field.startswith("experts_"):
                    experts += size
                elif field == ("embed" if config.tie_word_embeddings else "head"):
                    head += size
                elif field not in ("embed", "positions"):
                    dense += size
            sums += [dense, experts // num_experts, head]
        sums.append(kv_bytes_per_token(config, itemsize, cache_dtype))
        return cls(config, itemsize, ceilings, num_devices, *sums)

    def weight_bytes(self, num_tokens: int, num_samples: int = 1) -> float:
        """Bytes of weights that a step of ``num_tokens`` reads: of the experts those that so many tokens are expected
        to meet, were they spread evenly; the head only where something is sampled."""
        num_bytes = float(self.dense_bytes)
        if (moe := self.config.moe) is not None:
            missed = (1 - moe.num_experts_per_tok / moe.num_experts) ** num_tokens
            num_bytes += self.expert_bytes * moe.num_experts * (1 - missed)
        if num_samples:
            num_bytes += self.head_bytes
        return num_bytes

    def work(self, rows: Sequence[Row]) -> Work:
        """Bytes and floating-point operations of one step over ``rows``."""
        config = self.config
        num_tokens = sum(row.num_new_tokens for row in rows)
        num_samples = sum(row.samples for row in rows)
        per_token = self.dense_params
        if config.moe is not None:
            per_token += self.expert_params * config.moe.num_experts_per_tok
        flops = 2.0 * per_token * num_tokens + 2.0 * self.head_params * num_samples
        per_layer = self.kv_bytes / config.num_layers
        moved = self.weight_bytes(num_tokens, num_samples) + LOGIT_BYTES * config.vocab_size * num_samples
        windows: dict[int | None, int] = {}
        for layer in range(config.num_layers):
            windows[config.window(layer)] = windows.get(config.window(layer), 0) + 1
        per_pair = 2.0 * config.num_heads * self._dims_per_pair()
        for window, num_layers in windows.items():
            for row in rows:
                end = row.start + row.num_new_tokens
                first = 0 if window is None else max(0, row.start - window + 1)
                moved += num_layers * per_layer * (end - first)
                flops += num_layers * per_pair * attention_pairs(row.start, row.num_new_tokens, window)
        return Work(moved, flops)

    def _dims_per_pair(self) -> int:
        """Multiplications for one query head and one key: its score, and its share of the output."""
        if (mla := self.config.mla) is not None:
            return 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
        return 2 * self.config.head_dim

    def floor_s(self, work: Work) -> float:
        """The least seconds that ``work`` of one step takes."""
        return floor_s(work, self.ceilings) / self.num_devices

    def of_steps(self, steps: Sequence[Sequence[Row]], duration_s: float) -> dict[str, float]:
        """What a run's figures say of the ceilings: its steps' rows, and the seconds they took together."""
        works = [self.work(rows) for rows in steps]
        total = Work(sum(w.bytes for w in works), sum(w.flops for w in works))
        return {
            "roofline_percent": 100 * sum(map(self.floor_s, works)) / duration_s,
            "gb_per_s": total.bytes / duration_s / 1e9,
            "tflop_per_s": total.flops / duration_s / 1e12,
        }


def floor_s(work: Work, ceilings: Ceilings) -> float:
    """The least seconds that ``work`` takes one device."""
    return max(work.bytes / (ceilings.read_gb_per_s * 1e9), work.flops / (ceilings.tflop_per_s * 1e12))


def attention_pairs(start: int, num_new: int, window: int | None) -> int:
    """Keys seen, summed over the queries at ``start .. start + num_new - 1``, each seeing itself and what is before."""
    if window is None:
        return num_new * start + num_new * (num_new + 1) // 2
    whole = min(num_new, max(0, window - 1 - start))  # queries that see everything before them
    return attention_pairs(start, whole, None) + (num_new - whole) * window
