"""Which layers each stage of a mesh has: as many as make the stages' bytes most equal.

A step reads all of a stage's weights, so its bytes are its time, and all stages wait for the slowest. Embedding and
head are shared out over all devices, each of which looks up its rows for the first stage and multiplies with what the
last one has: they count the same for all stages. Arrays of the layers at one place in their stages are stacked, so a
device has room for as many layers as the stage that has the most.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp

from jaxserve.config import ModelConfig
from jaxserve.model.array_spec import is_spec
from jaxserve.model.params import layer_specs

PLAIN_BYTES = 2  # of an element that is not quantized: where other layers are, it is beside bfloat16


@cache  # asked for each parameter
def stage_layers(config: ModelConfig, num_stages: int) -> tuple[range, ...]:
    """The layers of each stage, at least one: the largest stage is as small as it can be, and the others are as equal
    as that allows.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if num_stages > config.num_layers:
        raise ValueError(f"num_layers={config.num_layers} is fewer than stage={num_stages}")
    if num_stages == 1:
        return (range(config.num_layers),)
    starts = _balanced(tuple(_layer_bytes(config, i) for i in range(config.num_layers)), num_stages)
    return tuple(range(a, b) for a, b in zip(starts, (*starts[1:], config.num_layers), strict=True))


def layers_per_stage(config: ModelConfig, num_stages: int) -> int:
    """LS: layers of the stage that has the most."""
    return max(map(len, stage_layers(config, num_stages)))


def _layer_bytes(config: ModelConfig, layer: int) -> int:
    leaves = jax.tree.leaves(layer_specs(config, layer), is_leaf=is_spec)
    return sum(math.prod(x.shape) * (jnp.dtype(x.dtype).itemsize if x.dtype else PLAIN_BYTES) for x in leaves)


def _balanced(sizes: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Where each of ``parts`` runs of ``sizes`` begins. Of all cuts the one whose largest run is smallest, of those the
    one with the least sum of squares; of equal ones the first runs are the longest."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)

    def cut(cost, worse) -> tuple[int, ...]:
        # best[i]: cost and starts of the first i sizes in as many runs as there were rounds.
        best = {i: (cost(ends[i]), (0,)) for i in range(1, len(ends))}
        for part in range(1, parts):
            best = {
                i: min(
                    ((worse(best[j][0], cost(ends[i] - ends[j])), (*best[j][1], j)) for j in range(part, i)),
                    key=lambda found: (found[0], [-start for start in found[1]]),
                )
                for i in range(part + 1, len(ends))
            }
        return best[len(sizes)][1]

    largest = cut(lambda run: run, max)
    limit = max(ends[b] - ends[a] for a, b in zip(largest, (*largest[1:], len(sizes)), strict=True))
    return cut(lambda run: run * run if run <= limit else math.inf, lambda a, b: a + b)
