"""What starting a step costs the host, and what it waits for: one model's compiled steps, fed with padding.

    PYTHONPATH=. python benchmarks/dispatch_on_device.py --rows 2,256 --prompt-tokens 128 --out FOLDER

Each bucket is timed with one step in flight behind the one that is started (as the engine does) and alone, with XLA's
graphs and (``--no-graphs``) without; the host's share is split by XLA's own trace events, which a graph does not hide.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp

from benchmarks.engine_on_device import add_options, say, sizes, use_options
from benchmarks.greedy_tokens import TINY
from jaxserve.bench.profile_summary import planes_of
from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import CacheConfig
from jaxserve.execution import runner
from jaxserve.execution.dummy import dummy_params
from jaxserve.parallel.mesh import make_mesh, parse_mesh
from jaxserve.step_io import Bucket, StepDims, new_inputs


def timed(run: runner.Runner, bucket: Bucket, in_flight: int, num_steps: int = 60) -> dict[str, float]:
    """Milliseconds of a step, medians: ``load``, ``step`` and ``sampler`` are calls that return before the device has
    done them."""
    parts: dict[str, list[float]] = {"load": [], "step": [], "sampler": [], "read": [], "whole": []}
    pending: list[jax.Array] = []
    for _ in range(num_steps):
        buffer = new_inputs(bucket, run.dims)[0]
        clock = [time.perf_counter()]
        inputs = run._loaders[bucket](run._state.inputs, buffer[None])
        state = dataclasses.replace(run._state, inputs=inputs)
        del inputs
        clock.append(time.perf_counter())
        state, logits = run._compiled[bucket, False](run._params, state, None)
        clock.append(time.perf_counter())
        sampler = run._samplers[bucket.num_rows, "greedy"]
        last_tokens, _, packed = sampler(
            state.last_tokens, None, run._free_outputs[bucket.num_rows].pop(), logits, state.inputs, None
        )
        run._state = dataclasses.replace(state, last_tokens=last_tokens)
        del logits, state, last_tokens
        pending.append(packed)
        del packed
        clock.append(time.perf_counter())
        if len(pending) > in_flight:
            run.read(pending.pop(0))
        clock.append(time.perf_counter())
        for name, start, end in zip(parts, clock, clock[1:]):
            parts[name].append(1e3 * (end - start))
        parts["whole"].append(1e3 * (clock[-1] - clock[0]))
    for handle in pending:
        run.read(handle)
    return {name: statistics.median(values[len(values) // 4 :]) for name, values in parts.items()}


def host_events(run: runner.Runner, bucket: Bucket, num_steps: int = 8) -> list[tuple[str, float, float]]:
    """(name, microseconds a step, times a step) of the host's trace events, longest first."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level, options.enable_hlo_proto = 0, 2, False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            timed(run, bucket, 1, num_steps)
        total, count = Counter[str](), Counter[str]()
        for plane in planes_of(Path(folder)):
            if plane.name.startswith("/host"):
                for line in plane.lines:
                    for event in line.events:
                        name = event.name.split("#")[0][:90]
                        total[name] += event.duration_ns / 1e3
                        count[name] += 1
    return [(name, us / num_steps, count[name] / num_steps) for name, us in total.most_common(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh", default="", help='as "tensor=2"')
    add_options(parser)
    parser.add_argument("--rows", type=sizes, default=(2,), help="of steps that decode")
    parser.add_argument("--prompt-tokens", type=sizes, default=(), help="of steps that read prompts")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--events", action="store_true", help="trace events of the host, too")
    parser.add_argument("--name", default="", help="of this run, in the record")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    config = TINY if args.config == "tiny" else read_shape(args.config)
    mesh, dtype = make_mesh(parse_mesh(args.mesh)), jnp.dtype(args.dtype)
    use_options(args.option)
    cache = CacheConfig(num_pages=1024, page_size=16)
    dims = StepDims(num_slots=max(args.rows, default=256), max_pages_per_seq=256, num_pages=1024, page_size=16)
    buckets = [Bucket(rows, 0, 0) for rows in args.rows] + [Bucket(0, n, min(64, n)) for n in args.prompt_tokens]

    def compile_step(lowered: jax.stages.Lowered, mesh: Any) -> jax.stages.Compiled:
        if not args.no_graphs:
            return original(lowered, mesh)
        return lowered.compile(compiler_options=runner.GPU_OPTIONS | {"xla_gpu_enable_command_buffer": ""})

    original = runner.compile_step
    with mock.patch.object(runner, "compile_step", compile_step):
        run = runner.Runner(config, dummy_params(config, mesh, dtype), cache, dims, buckets, mesh, dtype, ("greedy",))
    rows: list[dict[str, Any]] = []
    for bucket in buckets:
        for in_flight in (1, 0):
            row = {"name": args.name, "xla_flags": os.environ.get("XLA_FLAGS", ""), "graphs": not args.no_graphs}
            row |= {"bucket": tuple(bucket), "in_flight": in_flight} | timed(run, bucket, in_flight)
            rows.append(row)
            say(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v != ""))
        if args.events:
            rows[-1]["events"] = host_events(run, bucket)
            for name, us, count in rows[-1]["events"]:
                print(f"  {us:9.1f} us {count:7.1f} x  {name}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "dispatch.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
