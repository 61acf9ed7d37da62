"""``jaxserve bench kernels``: each kernel against its reference and what XLA has of its own, in one layer's shapes."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from jaxserve.bench.ceilings import Ceilings, measure_ceilings, seconds
from jaxserve.bench.environment import command_line, environment
from jaxserve.bench.kernel_attention import (
    decode_cases,
    prefill_cases,
    quantized_decode_cases,
    quantized_prefill_cases,
    rope_append_cases,
)
from jaxserve.bench.kernel_cases import Case, Setting, Way
from jaxserve.bench.kernel_products import grouped_cases, int4_cases, int8_cases
from jaxserve.bench.profile_summary import kernels as kernels_in
from jaxserve.bench.profile_summary import without_number
from jaxserve.bench.roofline import floor_s
from jaxserve.checkpoint.shapes import read_shape
from jaxserve.config import ParallelConfig
from jaxserve.engine.plan import resolve_dtype
from jaxserve.parallel.mesh import make_mesh

Row = dict[str, Any]
Progress = Callable[[str, int, int | None], None]  # stage, done, total
ROUND_S = 0.05  # of a round of calls, at least: a clock tells less from less


KERNELS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "int4_matmul": int4_cases,
    "int8_matmul": int8_cases,
    "grouped_matmul": grouped_cases,
    "decode_attention": decode_cases,
    "prefill_attention": prefill_cases,
    "quantized_decode_attention": quantized_decode_cases,
    "quantized_prefill_attention": quantized_prefill_cases,
    "rope_append": rope_append_cases,
}


def run(
    shapes: str | Path = "llama-3.1-8b",
    *,
    kernels: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    context: int | None = None,
    prompt_lens: Sequence[int] | None = None,
    page_size: int = 16,
    dtype: str = "auto",
    tuning: dict[str, Any] | None = None,
    repeats: int = 5,
    output: str | Path | None = None,
    on_progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """A row for each way to compute each kernel: what it took, of which ceilings, and what it was measured on.

    Figures are those of one call in a program of several that wait for each other. On a GPU ``kernels_us`` has what the
    device took for each of its kernels alone, by name: those between calls, which make each wait, too. A way that fails
    has an ``error`` in place of figures.

    Args:
        shapes: a name of ``checkpoint.shapes.SHAPES``, a ``config.json``, or a folder with one.
        kernels: of ``KERNELS``; None: all that the model has.
        batches: tokens of products and appends, rows of decode attention; None: 1, 16, 64, 256, on a CPU 1, 8.
        context: keys of a decode row; None: 1024, on a CPU 128.
        prompt_lens: of prefill attention; None: 512, 2048, 8192, on a CPU 128.
        tuning: fields of the Hopper kernels' ``Tuning``: kernels that have them all are timed with these, too.
        repeats: rounds, of which the median counts.
        output: a file that gets everything as JSON, written again after every row.

    Raises:
        ValueError: an option that cannot be; a model whose shapes are not timed; names it.
    """
    asked: dict[str, Any] = {"kernels": kernels, "batches": batches, "context": context, "prompt_lens": prompt_lens}
    asked |= {"page_size": page_size if page_size != 16 else None, "dtype": dtype if dtype != "auto" else None}
    asked |= {"tuning": [f"{k}={v}" for k, v in tuning.items()] if tuning else None}
    asked |= {"repeats": repeats if repeats != 5 else None}
    config = read_shape(shapes)
    if config.mla is not None:
        raise ValueError(f"shapes={Path(shapes).name!r}: the shapes of latent attention are not timed")
    on_cpu = jax.default_backend() == "cpu"
    for name in kernels or ():
        if name not in KERNELS:
            raise ValueError(f"kernels={name!r} is not one of {', '.join(KERNELS)}")
        if name == "grouped_matmul" and config.moe is None:
            raise ValueError(f"kernels={name!r}: shapes={Path(shapes).name!r} has no experts")
    batches = batches or ((1, 8) if on_cpu else (1, 16, 64, 256))
    prompt_lens = prompt_lens or ((128,) if on_cpu else (512, 2048, 8192))
    context = (128 if on_cpu else 1024) if context is None else context
    for name, values in {"batches": batches, "prompt_lens": prompt_lens}.items():
        if min(values) < 1:
            raise ValueError(f"{name}={tuple(values)} must be positive sizes")
    for name, value in {"context": context, "page_size": page_size, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    setting = Setting(
        config=config,
        dtype=resolve_dtype(dtype, make_mesh(ParallelConfig())),
        batches=batches,
        context=context,
        prompt_lens=prompt_lens,
        page_size=page_size,
        rotated_bytes=0 if on_cpu else 192 << 20,
        tuning=tuning or {},
    )
    setting.check_tuning()
    chosen = [name for name in KERNELS if kernels is None or name in kernels]
    if on_progress is not None:
        on_progress("ceilings", 0, None)
    ceilings = measure_ceilings(setting.dtype)
    about = {"shapes": Path(shapes).name, "dtype": setting.dtype.name, "page_size": page_size}
    about |= {"ceilings": asdict(ceilings)} | environment()
    about |= {"command": command_line("kernels", None, {"shapes": Path(shapes).name} | _set(asked))}
    about = json.loads(json.dumps(about))
    rows: list[Row] = []
    for name in chosen:
        for number, case in enumerate(KERNELS[name](setting)):
            if on_progress is not None:
                on_progress(name, number, None)
            for way in case.ways:
                rows.append(measured(case, way, ceilings, repeats) | about)
                if output is not None:
                    results = [{k: v for k, v in row.items() if k not in about} for row in rows]
                    text = json.dumps(about | {"results": results}, indent=1) + "\n"
                    Path(output).write_text(text, encoding="utf-8")
                if on_row is not None:
                    on_row(rows[-1])
    return rows


def _set(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


def measured(case: Case, way: Way, ceilings: Ceilings, repeats: int) -> Row:
    """One way's row, without what all rows share."""
    row: Row = {"kernel": case.kernel, **case.about, "implementation": way.implementation, "selected": way.is_selected}
    row |= {"bytes": way.work.bytes, "flops": way.work.flops, "floor_us": floor_s(way.work, ceilings) * 1e6}
    try:
        run_program = way.build()
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            jax.block_until_ready(run_program())
            once = time.perf_counter() - start
        rounds = max(1, min(10, int(ROUND_S / once)))
        s = seconds(run_program, calls=rounds, rounds=repeats) / way.num_calls
        alone = kernels_us(run_program, way.num_calls) if jax.default_backend() == "gpu" else None
    except Exception as error:  # of one way; the others may be of use, and a device is lent for minutes
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"}
    row |= {"us": s * 1e6, "gb_per_s": way.work.bytes / s / 1e9, "tflop_per_s": way.work.flops / s / 1e12}
    return row | {"roofline_percent": 100 * row["floor_us"] / row["us"], "kernels_us": alone}


def kernels_us(run_program: Callable[[], Any], num_calls: int, num_runs: int = 4) -> dict[str, float]:
    """Microseconds that the device takes for the kernels of one call, by their names without numbers at the end."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would fill the trace
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([run_program() for _ in range(num_runs)])
        intervals = max(kernels_in(Path(folder)).values(), key=len)
    total: dict[str, float] = {}
    for name, _, duration_ns in intervals:
        name = without_number(name)
        total[name] = total.get(name, 0.0) + duration_ns / 1e3 / (num_runs * num_calls)
    return total


def parse_tuning(text: str) -> dict[str, Any]:
    """``"ring=3,launch_early=true"`` as names and values. ValueError naming the option."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name] = json.loads(value.lower())
        except ValueError:
            raise ValueError(f'tuning: {part!r} is not a name and a value as "ring=3"') from None
    return found
