"""Stages with unequal numbers of layers."""

from dataclasses import replace
from itertools import combinations

import pytest

from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import MoEConfig
from jaxserve.model.stage_layers import _balanced, _layer_bytes, layers_per_stage, stage_layers
from tests import tiny


def counts(config, num_stages: int) -> list[int]:
    stages = stage_layers(config, num_stages)
    assert [layer for own in stages for layer in own] == list(range(config.num_layers))
    return [len(own) for own in stages]


def test_equal_layers_are_shared_out_evenly():
    config = replace(tiny.CONFIG, num_layers=30)
    assert counts(config, 4) == [8, 8, 7, 7] and layers_per_stage(config, 4) == 8
    assert counts(config, 2) == [15, 15] and counts(config, 1) == [30] and counts(config, 30) == [1] * 30
    assert counts(tiny.CONFIG, 3) == [2, 1, 1]
    with pytest.raises(ValueError, match="num_layers=4 is fewer than stage=5"):
        stage_layers(tiny.CONFIG, 5)


def test_small_layers_are_more_in_a_stage():
    """Of a model whose first layers have no experts, the first stage has more."""
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=96)
    config = replace(tiny.CONFIG, num_layers=10, moe=moe, moe_layers=tuple(i >= 4 for i in range(10)))
    sizes = [_layer_bytes(config, i) for i in range(10)]
    assert sizes[0] == sizes[3] < sizes[4] / 4
    assert counts(config, 2)[0] > 5


@pytest.mark.parametrize("sizes", [(3, 1, 4, 1, 5, 9, 2), (1, 1, 1, 1, 1, 1, 1), (9, 1, 1, 1, 1, 1, 9)])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_no_other_cut_is_better(sizes: tuple[int, ...], parts: int):
    def runs(starts: tuple[int, ...]) -> list[int]:
        return [sum(sizes[a:b]) for a, b in zip(starts, (*starts[1:], len(sizes)))]

    def cost(starts: tuple[int, ...]) -> tuple[int, int]:
        return max(runs(starts)), sum(run * run for run in runs(starts))

    every = [(0, *rest) for rest in combinations(range(1, len(sizes)), parts - 1)]
    assert cost(_balanced(sizes, parts)) == min(map(cost, every))


def test_the_deepest_models_are_cut_in_no_time():
    config = replace(read_shape("llama-3.3-70b"), num_layers=126)
    assert sorted(counts(config, 16)) == [7] * 2 + [8] * 14
