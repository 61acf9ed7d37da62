"""A model with a large vocabulary on pipeline stages: what one tick costs the processor, and what a device holds.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 PYTHONPATH=. python benchmarks/pipeline_head.py --mesh stage=4

Prints a JSON line for each way to sample. No engine: the same step again and again, of rows that all decode. Virtual
CPU devices share the processor's cores, so that what every stage calculates is counted as often as there are stages.
Of several processes on a machine, each started with its --process, the first prints; processor time is its own.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pipeline_bubble import CONFIG
from jaxserve.bench.environment import environment
from jaxserve.config import CacheConfig
from jaxserve.execution.placement import place_params
from jaxserve.execution.runner import Runner
from jaxserve.model.params import TreeSource, init_params
from jaxserve.parallel.mesh import make_mesh, parse_mesh
from jaxserve.step_io import Bucket, Sampling, StepDims, new_inputs

VOCAB = 65536
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "any")
CONTEXT, PAGE_SIZE, TICKS = 40, 16, 10


def main() -> None:
    parser = argparse.ArgumentParser(description="What a tick of a model with a large vocabulary costs.")
    parser.add_argument("--mesh", default="stage=4")
    parser.add_argument("--rows", type=int, default=8, help="Of the step in each stage.")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--process", type=int, default=0, help="Which of --processes this is.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coordinator", default="127.0.0.1:50071")
    asked = parser.parse_args()
    if asked.processes > 1:
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # as ``engine.joining`` has it
        jax.distributed.initialize(asked.coordinator, asked.processes, asked.process)
    config, mesh = replace(CONFIG, vocab_size=asked.vocab), make_mesh(parse_mesh(asked.mesh))
    dtype = jnp.dtype("float32")
    params = place_params(TreeSource(init_params(config, jax.random.key(0)), config), config, config, mesh, dtype)
    stages, bucket = mesh.shape["stage"], Bucket(asked.rows, 0, 0)
    each = -(-CONTEXT // PAGE_SIZE)
    cache = CacheConfig(num_pages=asked.rows * each, page_size=PAGE_SIZE)
    dims = StepDims(
        num_slots=stages * asked.rows,
        max_pages_per_seq=each,
        num_pages=cache.num_pages,
        page_size=PAGE_SIZE,
        hidden_tokens=asked.rows,
    )
    buffers = []
    for stage in range(stages):
        buffer, inputs = new_inputs(bucket, dims)
        inputs.slot_ids[:] = stage * asked.rows + np.arange(asked.rows)
        inputs.page_table[:] = np.arange(cache.num_pages).reshape(asked.rows, each)
        inputs.kv_lens[:], inputs.positions[:] = CONTEXT, CONTEXT - 1
        inputs.kv_write_index[:] = inputs.page_table[:, -1] * PAGE_SIZE + (CONTEXT - 1) % PAGE_SIZE
        inputs.token_ids[:], inputs.does_sample[:] = -1, 1  # the last one that was sampled
        inputs.temperature[:], inputs.top_k[:], inputs.top_p[:] = 1, asked.top_k, asked.top_p
        buffers.append(buffer)
    held = {
        device: sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device == device)
        for device in mesh.local_devices
    }
    runner = Runner(config, params, cache, dims, [bucket], mesh, dtype, SAMPLINGS)

    def ticks(sampling: Sampling) -> None:
        for _ in range(TICKS):
            runner.read(runner.sample(runner.forward(bucket, np.stack(buffers)), sampling))

    for sampling in SAMPLINGS:
        ticks(sampling)
        seen = []
        for _ in range(asked.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            ticks(sampling)
            seen.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = (1e3 / TICKS * statistics.median(times) for times in zip(*seen))
        row = {
            "mesh": asked.mesh,
            "processes": asked.processes,
            "vocab": asked.vocab,
            "rows": asked.rows,
            "sampling": sampling,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "cpu_ms_per_tick": cpu,
            "ms_per_tick": wall,
            "params_mb_a_device": max(held.values()) / 1e6,
        }
        if asked.process == 0:
            print(json.dumps(row | {"device": environment()["device"], "repeats": asked.repeats}), flush=True)


if __name__ == "__main__":
    main()
