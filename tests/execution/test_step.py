"""What the compiled step does with memory, and that compiling after ready would be seen."""

import threading

import jax
import jax.numpy as jnp
import pytest

from jaxserve.cache.pages import page_bytes
from jaxserve.config import CacheConfig, CacheDtype, ParallelConfig
from jaxserve.execution.compile_counter import CompileCounter
from jaxserve.execution.lowering import lower_step, state_shape
from jaxserve.execution.placement import place_params
from jaxserve.model.params import TreeSource
from jaxserve.model.stage_layers import layers_per_stage
from jaxserve.parallel.mesh import make_mesh
from jaxserve.step_io import Bucket, StepDims, buffer_size
from tests import tiny

MESHES = [ParallelConfig(), ParallelConfig(stage=2, tensor=2), ParallelConfig(stage=3)]
BUCKETS: list[tuple[Bucket, CacheDtype]] = [
    *((bucket, "auto") for bucket in (Bucket(1, 0, 0), Bucket(4, 0, 0), Bucket(0, 16, 3), Bucket(4, 16, 3))),
    (Bucket(1, 0, 0), "int8"), (Bucket(4, 16, 3), "int8"), (Bucket(4, 16, 3), "fp8"),
]  # fmt: skip


@pytest.mark.parametrize("bucket, dtype", BUCKETS)
@pytest.mark.parametrize("parallel", MESHES)
def test_the_cache_is_updated_in_place(bucket, dtype, parallel):
    mesh = make_mesh(parallel)
    cache = CacheConfig(num_pages=4096, page_size=4, dtype=dtype)
    dims = StepDims(num_slots=4, max_pages_per_seq=24, num_pages=4096, page_size=4, hidden_tokens=16)
    source = TreeSource(tiny.params(), tiny.CONFIG)
    params = place_params(source, tiny.CONFIG, tiny.CONFIG, mesh, jnp.dtype("float32"))
    state = state_shape(tiny.CONFIG, cache, dims, [bucket], mesh, jnp.dtype("float32"))
    compiled = lower_step(tiny.CONFIG, params, state, dims, bucket, mesh).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    cache_bytes = page_bytes(tiny.CONFIG, 4, jnp.dtype("float32"), parallel, dtype) * 4096  # on one device
    one_layer = cache_bytes // layers_per_stage(tiny.CONFIG, parallel.stage)
    assert analysis.alias_size_in_bytes >= cache_bytes
    assert analysis.temp_size_in_bytes < one_layer


def test_room_for_adapters_leaves_the_step_without_them_as_it_is():
    """But for the size of its inputs."""
    mesh, bucket = make_mesh(ParallelConfig()), Bucket(4, 16, 3)
    source = TreeSource(tiny.params(), tiny.CONFIG)
    params = place_params(source, tiny.CONFIG, tiny.CONFIG, mesh, jnp.dtype("float32"))
    texts = []
    for max_loras in (0, 2):
        dims = StepDims(num_slots=4, max_pages_per_seq=24, num_pages=16, page_size=4, max_loras=max_loras)
        cache = CacheConfig(num_pages=16, page_size=4)
        state = state_shape(tiny.CONFIG, cache, dims, [bucket], mesh, jnp.dtype("float32"))
        text = lower_step(tiny.CONFIG, params, state, dims, bucket, mesh).as_text()
        size = f"{buffer_size(bucket, dims)}xi32"
        assert size in text
        texts.append(text.replace(size, "NIxi32"))
    assert texts[0] == texts[1]


def test_compile_counter_counts_its_own_thread_under_watch_only():
    counter = CompileCounter()

    def compile_something(n: int) -> None:
        jax.jit(lambda x: x * n + 0.5)(jnp.zeros(n + 3))

    compile_something(1)
    assert counter.count == 0
    with counter.watch():
        thread = threading.Thread(target=compile_something, args=(2,))
        thread.start()
        thread.join()
        assert counter.count == 0
        compile_something(3)
    assert counter.count >= 2  # traced and compiled
    seen = counter.count
    counter.close()
    with counter.watch():
        compile_something(4)
    assert counter.count == seen
