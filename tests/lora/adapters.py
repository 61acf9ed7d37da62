"""Random adapters of the tiny model as live arrays, and the same merged into its weights."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.model.lora import PIECES, Adapter, factor_shapes
from jaxserve.model.params import Params


def random_adapter(config: ModelConfig, seed: int, rank: int, parameters: Iterable[str] = PIECES) -> Adapter:
    """Of which every matrix changes by about half of what it does."""
    r = np.random.default_rng(seed)

    def factors(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        first, second = r.standard_normal(a) * a[-1] ** -0.5, r.standard_normal(b) * (0.5 * rank**-0.5)
        return first.astype(np.float32), second.astype(np.float32)

    layers = []
    for i in range(config.num_layers):
        shapes = factor_shapes(config, i, rank)
        layers.append({name: factors(*shapes[name]) for name in parameters if name in shapes})
    return Adapter(rank, tuple(layers))


def merged(params: Params, adapter: Adapter) -> Params:
    """``params`` with the adapter's products added to their matrices."""
    layers = []
    for layer, factors in zip(params.layers, adapter.layers, strict=True):
        new = {}
        for name, (a, b) in factors.items():
            matrix = np.array(getattr(layer, name))
            if name == "qkv":  # [K, G + 2, H, D]: the queries, the key, the value
                group = matrix.shape[1] - 2
                for piece, heads in enumerate((slice(group), slice(group, group + 1), slice(group + 1, None))):
                    matrix[:, heads] += b[:, heads] @ a[piece]
            elif name == "gate_up":
                matrix += np.einsum("ufr,urd->ufd", b, a)
            else:
                matrix += b @ a[0]
            new[name] = matrix
        layers.append(dataclasses.replace(layer, **new))
    return dataclasses.replace(params, layers=tuple(layers))
