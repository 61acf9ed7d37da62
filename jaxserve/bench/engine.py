"""``jaxserve bench engine``: from a model's name to rows of figures that say what they were measured on and how."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxserve.bench.ceilings import Ceilings, measure_ceilings
from jaxserve.bench.environment import command_line, environment
from jaxserve.bench.offline import (
    DECODE_BATCHES,
    LATENCY_PROMPTS,
    NUM_REQUESTS,
    WORKLOADS,
    OfflineBenchmark,
    Row,
    longest_sequence,
)
from jaxserve.bench.roofline import Roofline
from jaxserve.config import ParallelConfig
from jaxserve.engine import plan
from jaxserve.engine.engine import Engine
from jaxserve.parallel.mesh import make_mesh, parse_mesh

Progress = Callable[[str, int, int], None]  # stage, done, total
DECIDED_HERE = ("prefix_caching", "skip_tokenizer_init", "lookahead")


class StartTimes:
    """An engine's ``on_progress`` that keeps the seconds between the ends of its stages, and passes everything on."""

    def __init__(self, on_progress: Progress | None = None):
        self.stages: dict[str, float] = {}
        self._start = self._last_end = time.perf_counter()
        self._on_progress = on_progress

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == total:
            self.stages[stage] = now - self._last_end
            self._last_end = now
        if self._on_progress is not None:
            self._on_progress(stage, done, total)

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._start


def run(
    model: str,
    *,
    workload: Sequence[str] = WORKLOADS,
    load_format: Literal["auto", "dummy"] = "auto",
    batch_sizes: Sequence[int] | None = None,
    prompt_lens: Sequence[int] | None = None,
    num_requests: int = NUM_REQUESTS,
    repeats: int = 5,
    output: str | Path | None = None,
    on_progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
    **options: Any,
) -> list[Row]:
    """One engine, and a row for its start and for each measurement.

    Args:
        batch_sizes, prompt_lens: of ``decode`` and ``latency``; None are NUMBERS' own, on a CPU those up to 8 and 1024.
        output: a file that gets everything as JSON, written again after every measurement.
        options: keywords of ``Engine.from_pretrained``. ``max_model_len`` None is what the workloads need, and
            ``max_num_seqs`` None the platform's default or the largest batch, whichever is more.

    Raises:
        ValueError: an option that the benchmark decides itself, or that no engine takes.
    """
    asked: dict[str, Any] = {"workload": tuple(workload), "load_format": load_format, "batch_sizes": batch_sizes}
    asked |= {"prompt_lens": prompt_lens, "num_requests": num_requests, "repeats": repeats} | options
    for name in options.keys() & set(DECIDED_HERE):
        raise ValueError(f"{name}={options[name]}: the benchmark decides it")
    for name in workload:
        if name not in WORKLOADS:
            raise ValueError(f"workload={name!r} is not one of {', '.join(WORKLOADS)}")
    if not workload:
        raise ValueError(f"workload is empty, give some of {', '.join(WORKLOADS)}")
    for name, values in {"batch_sizes": batch_sizes, "prompt_lens": prompt_lens}.items():
        if values is not None and (not values or min(values) < 1):
            raise ValueError(f"{name}={tuple(values)} must be positive sizes, at least one")
    for name, value in {"num_requests": num_requests, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if isinstance(mesh := options.get("mesh"), str) and (replica := parse_mesh(mesh).replica) != 1:
        raise ValueError(f"mesh {mesh}: replica={replica} must be 1, the benchmark is of one engine's steps")
    on_cpu = jax.default_backend() == "cpu"
    batch_sizes = batch_sizes or tuple(b for b in DECODE_BATCHES if b <= 8 or not on_cpu)
    prompt_lens = prompt_lens or tuple(n for n in LATENCY_PROMPTS if n <= 1024 or not on_cpu)
    platform = plan.CPU if on_cpu else plan.ACCELERATOR
    if options.get("max_model_len") is None:
        budget = (options.get("prefill_sizes") or platform["prefill_sizes"])[-1]
        options["max_model_len"] = longest_sequence(workload, prompt_lens, batch_sizes, budget)
    if options.get("max_num_seqs") is None:
        largest = max(batch_sizes) if "decode" in workload else 1
        options["max_num_seqs"] = max(platform["max_num_seqs"], largest)
    options.setdefault("max_num_waiting", max(1024, num_requests, *batch_sizes))

    dtype = plan.resolve_dtype(options.get("dtype") or "auto", make_mesh(ParallelConfig()))
    ceilings = measure_ceilings(dtype)  # before weights and cache take the memory
    start = StartTimes(on_progress)
    with Engine.from_pretrained(
        model,
        load_format=load_format,
        skip_tokenizer_init=True,
        prefix_caching=False,
        on_progress=start,
        **options,
    ) as engine:
        record = Record(engine, ceilings, command_line("engine", model, _set(asked)), output, on_row)
        record.add({"workload": "start", "start_s": start.total_s, "stages_s": start.stages})
        bench = OfflineBenchmark(engine, record.roofline)
        bench.run(
            workload,
            batch_sizes=batch_sizes,
            prompt_lens=prompt_lens,
            num_requests=num_requests,
            repeats=repeats,
            on_row=record.add,
        )
    return record.rows


def _set(asked: dict[str, Any]) -> dict[str, Any]:
    defaults = {"workload": WORKLOADS, "load_format": "auto", "num_requests": NUM_REQUESTS, "repeats": 5}
    return {name: value for name, value in asked.items() if value is not None and value != defaults.get(name)}


class Record:
    """The rows of one engine, each with all that is needed to repeat it, in a file after every one.

    Args:
        output: the file, or None.
        on_row: called with every complete row.
        about: what to say of the environment beside or instead of ``environment()``.
    """

    def __init__(
        self,
        engine: Engine,
        ceilings: Ceilings,
        command: str,
        output: str | Path | None = None,
        on_row: Callable[[Row], None] | None = None,
        about: dict[str, Any] | None = None,
    ):
        num_devices = engine.parallel_config.num_devices
        itemsize, cache_dtype = jnp.dtype(engine.dtype).itemsize, engine.cache_config.dtype
        self.roofline = Roofline.of(engine.model_config, itemsize, ceilings, num_devices, cache_dtype)
        self.rows: list[Row] = []
        self._output = None if output is None else Path(output)
        self._on_row = on_row
        scheduler, cache = engine.scheduler_config, engine.cache_config
        self._about = {
            "model": engine.model_name,
            "dtype": engine.dtype,
            "mesh": str(engine.parallel_config),
            "max_model_len": scheduler.max_model_len,
            "max_num_seqs": scheduler.max_num_seqs,
            "decode_sizes": scheduler.decode_sizes,
            "prefill_sizes": scheduler.prefill_sizes,
            "num_pages": cache.num_pages,
            "page_size": cache.page_size,
            "ceilings": asdict(ceilings),
        }
        self._about |= environment() | {"command": command} | (about or {})
        self._about = json.loads(json.dumps(self._about))  # tuples as lists, as a reader of the file has them

    def add(self, row: Row) -> None:
        self.rows.append(row | self._about)
        if self._output is not None:
            results = [{k: v for k, v in r.items() if k not in self._about} for r in self.rows]
            self._output.write_text(json.dumps(self._about | {"results": results}, indent=1) + "\n", encoding="utf-8")
        if self._on_row is not None:
            self._on_row(self.rows[-1])
