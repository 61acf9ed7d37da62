"""The memory that is planned for: the workspace by few layers, and what a folder keeps of it for the next start."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import ModelConfig, ParallelConfig
from jaxserve.engine import plan
from jaxserve.execution.placement import place_params
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny

DEEP = replace(tiny.CONFIG, num_layers=12, layer_windows=(None, 7) * 6)
MESH = make_mesh(ParallelConfig())
FLOAT32 = jnp.dtype("float32")


def planned(config: ModelConfig):
    """What ``_workspace_bytes`` takes of a model."""
    params = place_params(TreeSource(init_params(config, jax.random.key(0)), config), config, config, MESH, FLOAT32)
    scheduler = plan.scheduler_config(
        config, MESH, max_model_len=64, max_num_seqs=4, prefill_sizes=(64,), decode_sizes=(4,)
    )
    return config, scheduler, params


def test_a_few_layers_tell_the_workspace_of_all(monkeypatch):
    config, scheduler, params = planned(DEEP)
    rest: Any = (MESH, FLOAT32, 4, ("greedy",), None, "auto")
    layers = []

    def lower(own, *arguments):
        layers.append(own.num_layers)
        return lower_step(own, *arguments)

    lower_step = plan.lower_step
    monkeypatch.setattr(plan, "lower_step", lower)
    few = plan._workspace_bytes(config, scheduler, params, *rest)
    monkeypatch.setattr(plan, "probed_layers", lambda config: config.num_layers)
    everything = plan._workspace_bytes(config, scheduler, params, *rest)
    assert layers == [2, 4, 12]
    assert few == pytest.approx(everything, rel=0.1)


def test_probed_layers_have_every_kind():
    assert plan.probed_layers(DEEP) == plan.probed_layers(replace(DEEP, layer_windows=())) == 2
    assert plan.probed_layers(replace(DEEP, layer_windows=(*DEEP.layer_windows[:8], 5, 7, None, 7))) == 9
    assert plan.probed_layers(replace(DEEP, num_layers=1, layer_windows=())) == 1


def test_the_first_layers_of_a_quantized_model():
    config = plan.shorter(read_shape("llama-3.1-8b-awq"), 2)
    assert config.num_layers == 2 and config.quantization is not None
    assert {name.split(".")[1] for name in config.quantization.formats()} == {"0", "1"}


def test_the_next_start_has_a_cache_of_the_same_shape(tmp_path, monkeypatch, caplog):
    config, scheduler, params = planned(replace(tiny.CONFIG, num_layers=2))
    free, asked = [0], []
    monkeypatch.setattr(plan, "_is_cpu", lambda mesh: False)
    monkeypatch.setattr(plan, "free_bytes", lambda device, fraction: free[0])

    def workspace(*arguments: object) -> int:
        asked.append(arguments)
        return 1000

    monkeypatch.setattr(plan, "_workspace_bytes", workspace)
    scheduler = replace(scheduler, max_num_seqs=1000, decode_sizes=(1000,), prefill_sizes=(1024,))

    def pages(num: int, folder=tmp_path) -> int:
        """Where there is room for so many."""
        one = plan.page_bytes(config, 4, FLOAT32, ParallelConfig(), "auto")
        free[0] = 1000 + num * one + one // 2
        return plan.num_pages_that_fit(config, scheduler, params, [MESH], FLOAT32, 4, None, ("greedy",), keep_in=folder)

    assert pages(9000) == 8960 and len(asked) == 1
    assert [pages(n) for n in (8960, 8959, 8897, 9023, 9024)] == [8960] * 5  # some less, some more: the same programs
    assert pages(9025) == 9024 and pages(8000) == 8000  # not so many more or less
    assert len(asked) == 1  # the workspace is known
    assert pages(9000, tmp_path / "other") == 8960 and len(asked) == 2
    for path in (tmp_path / "programs").iterdir():
        path.write_bytes(b"[1")
    assert pages(9000) == 8960 and len(asked) == 3
    assert "cannot be used and is made again" in caplog.text
    assert pages(9000) == 8960 and len(asked) == 3
