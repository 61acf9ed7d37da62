"""Compiled programs that a second start finds again."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.config import CacheConfig, ModelConfig, ParallelConfig
from jaxserve.execution import kept, runner
from jaxserve.execution.placement import place_params
from jaxserve.execution.runner import Runner
from jaxserve.model.params import TreeSource
from jaxserve.parallel.mesh import make_mesh
from jaxserve.step_io import Bucket, StepDims, new_inputs
from tests import tiny

ONE_DEVICE = ParallelConfig()
BUCKETS = [Bucket(2, 0, 0), Bucket(0, 16, 2)]
DIMS = StepDims(num_slots=2, max_pages_per_seq=4, num_pages=8, page_size=4, hidden_tokens=16)


@pytest.fixture(autouse=True)
def jax_cache() -> Iterator[Callable[[Path | None], None]]:
    """Sets the folder of JAX's own cache; without it, there is none in these tests."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}

    def use(folder: Path | None) -> None:
        jax.config.update(names[0], None if folder is None else str(folder))
        jax.config.update(names[1], 0)
        compilation_cache.reset_cache()

    use(None)
    yield use
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def start(folder: Path, config: ModelConfig = tiny.CONFIG, parallel: ParallelConfig = ONE_DEVICE) -> Runner:
    mesh = make_mesh(parallel)
    source = TreeSource(tiny.params(), config)
    params = place_params(source, config, config, mesh, jnp.dtype("float32"))
    cache = CacheConfig(num_pages=8, page_size=4)
    return Runner(config, params, cache, DIMS, BUCKETS, mesh, jnp.dtype("float32"), ("greedy",), keep_in=folder)


def tokens(made: Runner) -> list[int]:
    """Of a prompt of five tokens."""
    buffer, inputs = new_inputs(BUCKETS[1], DIMS)
    inputs.token_ids[:5], inputs.positions[:5] = range(3, 8), range(5)
    inputs.kv_write_index[:5] = range(5)
    inputs.page_table[0, :2] = 0, 1
    inputs.prefill_cu_q_lens[1:] = 5
    inputs.sample_index[0], inputs.kv_lens[0], inputs.slot_ids[0], inputs.does_sample[0] = 4, 5, 0, 1
    buffers = np.stack([buffer] * made.mesh.shape["stage"])  # a tick for each stage; then the last has the logits
    computed = [made.forward(BUCKETS[1], buffers) for _ in buffers][-1]
    outputs = made.read(made.sample(computed, "greedy"))
    return [int(outputs.tokens[0]), round(float(outputs.logprobs[0]) * 1e4)]


def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """Collects the buckets whose steps are lowered from here on."""
    seen: list[Bucket] = []
    lower = runner.lower_step

    def lower_step(*args):
        seen.append(args[4])
        return lower(*args)

    monkeypatch.setattr(runner, "lower_step", lower_step)
    return seen


def test_a_second_start_traces_nothing_and_computes_the_same(tmp_path, monkeypatch):
    parallel = ParallelConfig(stage=2, tensor=2)
    first = start(tmp_path, parallel=parallel)
    expected = tokens(first)
    pages = first._state.kv_pages[0]
    tokens(first)
    assert pages.is_deleted()  # donated
    first.close()
    seen = lowered(monkeypatch)
    second = start(tmp_path, parallel=parallel)
    assert not seen
    assert tokens(second) == expected
    pages = second._state.kv_pages[0]
    tokens(second)
    assert pages.is_deleted()  # as before
    assert second.compile_counter.count == 0
    second.close()


def test_what_depends_on_something_else_is_another_program(tmp_path, monkeypatch):
    def path(config: ModelConfig = tiny.CONFIG, dtype: str = "float32", parallel: ParallelConfig = ONE_DEVICE) -> Path:
        mesh = make_mesh(parallel)
        source = TreeSource(tiny.params(), config)
        facts = (config, place_params(source, config, config, mesh, jnp.dtype(dtype)))
        return kept.KeptPrograms(tmp_path, mesh, facts).path("step")

    first = path()
    assert path() == first
    others = [
        path(replace(tiny.CONFIG, norm_eps=tiny.CONFIG.norm_eps * 2)),
        path(dtype="bfloat16"),
        path(parallel=ParallelConfig(tensor=2)),
        path(parallel=ParallelConfig(stage=2)),
    ]
    monkeypatch.setenv("XLA_FLAGS_OF_A_TEST", "1")
    others.append(path())
    monkeypatch.delenv("XLA_FLAGS_OF_A_TEST")
    monkeypatch.setattr(kept, "_source_digest", lambda: "other source")
    others.append(path())
    assert len({first, *others}) == 7


def test_damaged_files_and_folders_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    expected = start(tmp_path / "kept")
    files = sorted((tmp_path / "kept").rglob("*"))
    for i, file in enumerate(f for f in files if f.is_file()):
        file.write_bytes(file.read_bytes()[:100] if i % 2 else b"")
    seen = lowered(monkeypatch)
    with caplog.at_level(logging.WARNING):
        again = start(tmp_path / "kept")
    assert "cannot be used and is made again" in caplog.text
    assert set(seen) == set(BUCKETS)
    assert tokens(again) == tokens(expected)
    seen.clear()
    start(tmp_path / "kept").close()  # written again
    assert not seen
    caplog.clear()
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        other = start(tmp_path / "file")
    assert "is not kept for the next start" in caplog.text
    assert tokens(other) == tokens(expected)


def test_what_jax_had_is_not_kept(tmp_path, monkeypatch, jax_cache):
    """XLA for CPUs cannot write again what it has read."""
    jax_cache(tmp_path / "jax")
    start(tmp_path / "one").close()
    start(tmp_path / "other").close()  # the same programs, from JAX's cache
    seen = lowered(monkeypatch)
    start(tmp_path / "one").close()
    assert not seen
    start(tmp_path / "other").close()
    assert set(seen) == set(BUCKETS)


def test_what_jax_had_and_has_still_in_memory_is_not_kept(tmp_path, jax_cache):
    """The program that JAX's cache gave is given again, without the cache, while one that has it lives."""
    jax_cache(tmp_path / "jax")
    jax.clear_caches()  # of the tests before this one
    first = start(tmp_path / "one")
    expected = tokens(first)
    jax.clear_caches()
    others = [start(tmp_path / "other") for _ in range(3)]  # the third would read what the second kept
    assert [tokens(other) for other in others] == [expected] * 3
    assert not list((tmp_path / "other").rglob("*"))
