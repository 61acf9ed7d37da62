"""From a model as its checkpoint has it to the model that the devices of a mesh compute."""

from dataclasses import replace

import numpy as np

from jaxserve.config import ModelConfig, RopeConfig
from jaxserve.model.params import ParamSource


def placed_config(config: ModelConfig, tensor: int, max_model_len: int) -> ModelConfig:
    """``config`` with all decided that a mesh and a length decide.

    * A kv head that several devices share is there once for each, with its part of the query heads (``ReplicatedHeads``
      reads the parameters so): ``num_kv_heads`` is at least ``tensor``.
    * longrope has one list of factors: the long one where more than the original length is served.
    * A window no shorter than ``max_model_len`` hides nothing, and is none.
    """

    def chosen(rope: RopeConfig) -> RopeConfig:
        if rope.scaling != "longrope":
            return rope
        is_long = max_model_len > (rope.original_max_position_embeddings or 0)
        factors = rope.long_factor if is_long else rope.short_factor
        return replace(rope, short_factor=factors, long_factor=factors)

    windows = tuple(None if w is None or w >= max_model_len else w for w in config.layer_windows)
    return replace(
        config,
        num_kv_heads=config.num_kv_heads * copies_of_kv_heads(config, tensor),
        ropes=tuple(chosen(rope) for rope in config.ropes),
        layer_windows=() if all(w is None for w in windows) else windows,
    )


def copies_of_kv_heads(config: ModelConfig, tensor: int) -> int:
    """Devices of the tensor axis that share one kv head."""
    return 1 if config.mla is not None else max(1, tensor // config.num_kv_heads)


class ReplicatedHeads:
    """A ``ParamSource`` of ``placed_config``'s parameters over one of the checkpoint's.

    Copy ``c`` of a kv head has the ``c``-th part of its G query heads; with ``copies`` = 1 nothing changes.
    """

    def __init__(self, source: ParamSource, config: ModelConfig, copies: int):
        self._source, self._copies = source, copies
        self._group = config.num_heads // config.num_kv_heads // copies  # G of a copy

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See ``ParamSource``."""
        kind = (name.split(".")[2:] or [name])[0]  # a quantized matrix' arrays have its axes but the last
        if self._copies == 1 or kind not in ("qkv", "qkv_bias", "q_norm", "k_norm", "sinks"):
            return self._source.read(name, index)
        has_heads = {"qkv": 4, "qkv_bias": 3, "q_norm": 3, "k_norm": 2, "sinks": 2}[kind]
        if len(index) < has_heads:  # a norm that all heads share
            return self._source.read(name, index)
        return np.stack([self._one_head(kind, name, k, index[1:]) for k in range(index[0].start, index[0].stop)])

    def _one_head(self, kind: str, name: str, head: int, rest: tuple[slice, ...]) -> np.ndarray:
        source_head, copy = divmod(head, self._copies)
        one, group = slice(source_head, source_head + 1), self._group
        if kind == "k_norm":
            return self._source.read(name, (one, *rest))[0]
        queries = slice(copy * group, (copy + 1) * group)
        if kind in ("q_norm", "sinks"):
            part = self._source.read(name, (one, queries, *rest[1:]))[0]
        else:
            key_and_value = slice(self._copies * group, self._copies * group + 2)
            parts = [self._source.read(name, (one, heads, *rest[1:]))[0] for heads in (queries, key_and_value)]
            part = np.concatenate(parts)  # [G + 2, ...]
        return part[rest[0]]
