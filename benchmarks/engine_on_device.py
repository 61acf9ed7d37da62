"""The engine of one model's shapes on the device at hand, in few minutes: checked, started, measured, profiled.

Everything is written to the folder ``--out`` after each measurement, so that a run cut short is of use.

    PYTHONPATH=. python benchmarks/engine_on_device.py --out FOLDER --decode-sizes 1,8,64 --prefill-sizes 128,1024,2048

needs jax, flax, numpy and rich; jaxserve need not be installed.
"""

import argparse
import functools
import gzip
import json
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

START = time.perf_counter()
# The cache is as large as the workloads need, not as the memory allows: XLA's own share of it has to hold that.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.greedy_tokens import TINY, check  # noqa: E402
from jaxserve.bench import offline, profile_summary  # noqa: E402
from jaxserve.bench.ceilings import measure_ceilings  # noqa: E402
from jaxserve.bench.engine import Record, StartTimes  # noqa: E402
from jaxserve.bench.report import print_engine  # noqa: E402
from jaxserve.checkpoint.shapes import read_shape  # noqa: E402
from jaxserve.engine.engine import Engine  # noqa: E402
from jaxserve.engine.step_times import StepTimes  # noqa: E402
from jaxserve.execution import runner  # noqa: E402
from jaxserve.execution.dummy import dummy_params  # noqa: E402
from jaxserve.parallel.mesh import make_mesh, parse_mesh  # noqa: E402
from jaxserve.sampling_params import SamplingParams  # noqa: E402
from jaxserve.step_io import Bucket  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:7.1f} s  {text}", flush=True)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--option", action="append", default=[], help="of XLA, as NAME=VALUE, for what is compiled")


def use_options(asked: list[str]) -> None:
    """Steps are compiled with these ``--option`` from here on."""
    for name, _, value in (text.partition("=") for text in asked):
        runner.GPU_OPTIONS[name] = {"true": True, "false": False}.get(value, value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b", help="a known shape, a config.json, or tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh", default="", help='as "tensor=2"')
    add_options(parser)
    parser.add_argument("--workloads", nargs="*", default=["decode", "prefill", "latency"])
    parser.add_argument("--decode-sizes", type=sizes, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--batches", type=sizes, help="of decode; all decode sizes without")
    parser.add_argument("--prefill-sizes", type=sizes, default=(128, 1024, 2048))
    parser.add_argument("--prompt-lens", type=sizes, default=offline.LATENCY_PROMPTS)
    parser.add_argument("--num-requests", type=int, default=offline.NUM_REQUESTS, help="of throughput")
    parser.add_argument("--num-pages", type=int, help="what the workloads need, without")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile-batches", type=sizes, default=(1, 64))
    parser.add_argument("--compilation-cache-dir", type=Path)
    parser.add_argument(
        "--measure-until",
        type=float,
        default=float("inf"),
        help="seconds since the start after which no measurement begins; profiles are still taken",
    )
    parser.add_argument("--checked", action="append", default=[], help="a kernel to be used, too, that is not yet")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


# The start, in its parts.


@contextmanager
def announced(stages: list[dict[str, Any]]) -> Iterator[None]:
    """Prints what each bucket's lowering and compilation take, and keeps it in ``stages``."""
    here = threading.local()

    def timed(what: str, f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def run(*args: Any, **kwargs: Any) -> Any:
            # A step is of a bucket, a sampler of a number of rows.
            of = next((x for x in args if isinstance(x, (Bucket, int))), None)
            if of is not None:
                here.of = f"{what} {tuple(of) if isinstance(of, Bucket) else of}"
            start = time.perf_counter()
            result = f(*args, **kwargs)
            seconds = time.perf_counter() - start
            name = here.of if of is not None else f"{what} of {getattr(here, 'of', '?')}"
            stages.append({"stage": name, "seconds": seconds})
            if seconds > 0.5:
                say(f"{name}: {seconds:.1f} s")
            return result

        return run

    with ExitStack() as patches:
        for name, what in {"lower_step": "step", "lower_sampler": "sampler", "compile_step": "XLA"}.items():
            patches.enter_context(mock.patch.object(runner, name, timed(what, getattr(runner, name))))
        yield


def pages_needed(args: argparse.Namespace, batches: tuple[int, ...], max_model_len: int) -> int:
    def pages(tokens: int) -> int:
        return -(-tokens // args.page_size) + 1

    longest = pages(max_model_len)
    largest = max(batches, default=1)
    steady = offline.DECODE_TOKENS + -(-largest * offline.DECODE_PROMPT // args.prefill_sizes[-1]) + 8
    need = {
        "latency": longest,
        "decode": largest * pages(offline.DECODE_PROMPT + steady),
        "prefill": offline.PREFILL_PROMPTS * pages(offline.PREFILL_PROMPT + 1),
        "throughput": args.decode_sizes[-1] * pages(600),  # the lengths' means are 212 and 221
    }
    needed = max(longest, *(need[w] for w in args.workloads))
    return needed + needed // 50  # the scheduler's watermark


def measurements(args: argparse.Namespace, batches: tuple[int, ...]) -> list[tuple[str, int]]:
    """(workload, batch or prompt length; 0 where the workload has its own), in the order asked."""
    by_size = {"decode": batches, "latency": args.prompt_lens}
    return [(workload, size) for workload in args.workloads for size in by_size.get(workload, (0,))]


def profile_decode(engine: Engine, prompts: list[list[int]], folder: Path, num_steps: int = 12) -> dict[str, Any]:
    """A trace of ``num_steps`` steps that decode ``prompts`` and nothing else, summed up; it lies in ``folder``."""
    batch = len(prompts)
    prompt_steps = batch * len(prompts[0]) // engine.scheduler_config.prefill_sizes[-1] + 1
    asked = SamplingParams(temperature=0, max_tokens=prompt_steps + num_steps + 16, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(engine.make_request(prompt, asked))
    last: list[StepTimes] = []
    whole = 0
    while whole < 4 and engine.has_unfinished():
        engine.step(on_times=last.append)
        step = last[-1].batch
        whole = whole + 1 if step and not step.bucket.prefill_tokens and len(step.rows) == batch else 0
    with trace(folder):
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        step_s = (time.perf_counter() - start) / num_steps
    while engine.has_unfinished():
        engine.step()
    return {"workload": "decode", "batch_size": batch} | summed_up(folder, step_s)


def profile_prefill(engine: Engine, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """A trace of reading ``prompts``."""
    with trace(folder):
        run = offline.drive(engine, prompts, [1] * len(prompts))
    steps = sum(step.batch is not None for step in run.steps)
    return {"workload": "prefill", "batch_size": len(prompts)} | summed_up(folder, run.duration_s / steps)


def trace(folder: Path) -> Any:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host, which is part of what is looked at
    options.host_tracer_level = 0
    options.enable_hlo_proto = False  # of every compiled step: they would be most of the trace
    return jax.profiler.trace(str(folder), profiler_options=options)


def summed_up(folder: Path, step_s: float) -> dict[str, Any]:
    device, intervals = max(profile_summary.kernels(folder).items(), key=lambda item: len(item[1]))
    return {"device_plane": device} | profile_summary.summary(intervals, step_s)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    use_options(args.option)
    dispatch.MOSAIC_GPU_CHECKED |= set(args.checked)

    def write(name: str, value: Any) -> None:
        (args.out / name).write_text(json.dumps(value, indent=1) + "\n")

    say(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if not args.no_check:
        try:
            checked = check(args.mesh)
        except Exception as error:  # what fails here may be right in what follows
            checked = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        say(f"check: {'ok' if checked['ok'] else 'FAILED'} {checked}")
        write("check.json", checked)
    ceilings = measure_ceilings(args.dtype)
    say(f"ceilings: {ceilings.read_gb_per_s:,.0f} GB/s of reading, {ceilings.tflop_per_s:,.1f} TFLOP/s")

    config = TINY if args.config == "tiny" else read_shape(args.config)
    batches = args.batches or args.decode_sizes
    max_model_len = offline.longest_sequence(args.workloads, args.prompt_lens, batches, args.prefill_sizes[-1])
    stages: list[dict[str, Any]] = []
    start = StartTimes()
    mesh = make_mesh(parse_mesh(args.mesh))
    params = dummy_params(config, mesh, jnp.dtype(args.dtype), on_tensor=lambda done, total: None)
    start("dummy weights", 1, 1)
    say(f"weights: {sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9:.2f} GB in {start.total_s:.1f} s")
    with announced(stages):
        engine = Engine(
            config,
            params,
            model_name=args.config,
            mesh=mesh,
            dtype=args.dtype,
            max_model_len=max_model_len,
            max_num_seqs=args.decode_sizes[-1],
            decode_sizes=args.decode_sizes,
            prefill_sizes=args.prefill_sizes,
            samplings=("greedy",),
            num_pages=args.num_pages or pages_needed(args, batches, max_model_len),
            page_size=args.page_size,
            prefix_caching=False,
            compilation_cache_dir=args.compilation_cache_dir,
            on_progress=start,
        )
    del params
    say(f"engine: {start.total_s:.1f} s: " + ", ".join(f"{k} {v:.1f} s" for k, v in start.stages.items()))
    about = {"commit": args.commit} if args.commit else {}
    command = shlex.join(["python", "benchmarks/engine_on_device.py", *sys.argv[1:]])

    def on_row(row: dict[str, Any]) -> None:
        keys = ("prompt_len", "batch_size", "ttft_ms", "tpot_ms", "step_ms_p50", "step_ms_p99", "prompt_tokens_per_s",
                "output_tokens_per_s", "requests_per_s", "roofline_percent", "host_ms_p50", "dispatch_ms_p50",
                "host_share", "dispatch_share", "wait_share")  # fmt: skip
        figures = [f"{k} {v:.4g}" for k in keys if isinstance(v := row.get(k), (int, float))]
        say(f"{row['workload']}: " + ", ".join(figures))

    with engine:
        record = Record(engine, ceilings, command, args.out / "engine.json", on_row, about)
        record.add({"workload": "start", "start_s": start.total_s, "stages_s": start.stages, "buckets": stages})
        bench = offline.OfflineBenchmark(engine, record.roofline)
        try:
            for workload, size in measurements(args, batches):
                if time.perf_counter() - START > args.measure_until:
                    say(f"left out: {workload} {size or ''}")
                    continue
                bench.run(
                    [workload],
                    batch_sizes=(size,),
                    prompt_lens=(size,),
                    num_requests=args.num_requests,
                    repeats=args.repeats,
                    on_row=record.add,
                )
            jobs: list[tuple[str, Callable[..., dict[str, Any]], int, int]] = [
                (f"decode_{batch}", profile_decode, batch, offline.DECODE_PROMPT) for batch in args.profile_batches
            ]
            if "prefill" in args.workloads and args.profile_batches:
                jobs.append(("prefill", profile_prefill, 4, offline.PREFILL_PROMPT))
            profiles = []
            for name, make, count, length in jobs:
                with tempfile.TemporaryDirectory() as folder:
                    profiles.append(make(engine, bench.prompts(count, length), Path(folder)))
                    packed = gzip.compress(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
                    (args.out / f"{name}.xplane.pb.gz").write_bytes(packed)
                write("profile.json", profiles)
                say(f"profile of {name}")
                print("\n".join(profile_summary.lines(profiles[-1])), flush=True)
        finally:
            print_engine(record.rows, Console(width=150))


if __name__ == "__main__":
    main()
