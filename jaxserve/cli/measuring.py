"""``jaxserve bench``: measurements of this machine, as a table or JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.cli.loading import check_devices, leaving_at_interrupt, select_platform
from jaxserve.cli.options import EngineOptions, Json, Model, Platform, flatten_options, parse_sizes
from jaxserve.cli.terminal import ProgressDisplay, write_answer

app = typer.Typer(help="Measure, from one run, and print a table or JSON.")


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """A workload of varied lengths. Unset is left to the benchmark's default."""

    num_requests: Annotated[int | None, typer.Option(help="Requests, all there at the start.")] = None
    max_prompt: Annotated[int | None, typer.Option(help="Tokens of the longest prompt.")] = None
    max_output: Annotated[int | None, typer.Option(help="Tokens of the longest output.")] = None
    seed: Annotated[int | None, typer.Option(help="Same seed, same lengths and prompts.")] = None

    def keywords(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Requests that arrive when they will. Unset is left to the benchmark's default."""

    trace: Annotated[Path | None, typer.Option(help="A file of requests, a JSON object a line; or:")] = None
    request_rate: Annotated[float | None, typer.Option(help="Requests a second, at random moments.")] = None
    num_requests: Annotated[int | None, typer.Option(help="So many, or the first so many of a trace.")] = None
    speed: Annotated[float | None, typer.Option(help="A trace's requests come so many times as fast.")] = None
    max_prompt: Annotated[int | None, typer.Option(help="Tokens of the longest prompt (no trace).")] = None
    max_output: Annotated[int | None, typer.Option(help="Tokens of the longest output (no trace).")] = None
    seed: Annotated[int | None, typer.Option(help="Same seed, same requests (no trace).")] = None
    compare_prefix_cache: Annotated[
        bool, typer.Option("--compare-prefix-cache", help="Once with and once without the prefix cache.")
    ] = False
    load_format: Annotated[str | None, typer.Option(help='"dummy": random weights of a shape.')] = None
    output: Annotated[Path | None, typer.Option(help="Write everything to this file as JSON, too.")] = None

    def keywords(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OverheadOptions:
    """What to measure of a server. Unset is left to the benchmark's default."""

    prompt_len: Annotated[int | None, typer.Option(help="Tokens.")] = None
    num_output_tokens: Annotated[int | None, typer.Option(help="Of a request.")] = None
    repeats: Annotated[int | None, typer.Option(help="Requests of each way.")] = None
    load_format: Annotated[str | None, typer.Option(help='"dummy": random weights of a shape.')] = None
    num_streamed_tokens: Annotated[int | None, typer.Option(help="Of which messages are counted.")] = None
    output: Annotated[Path | None, typer.Option(help="Write everything to this file as JSON, too.")] = None

    def keywords(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """What to measure of an engine. Unset is left to the benchmark's default."""

    workload: Annotated[
        str | None, typer.Option(help='Some of "latency,decode,prefill,throughput". (default: all)')
    ] = None
    load_format: Annotated[
        str | None, typer.Option(help='"dummy": random weights; MODEL is a config.json, its folder or a known shape.')
    ] = None
    batch_sizes: Annotated[str | None, typer.Option(help='Of decode, as "1,8,64".')] = None
    prompt_lens: Annotated[str | None, typer.Option(help='Of latency, as "128,1024".')] = None
    num_requests: Annotated[int | None, typer.Option(help="Of throughput.")] = None
    repeats: Annotated[int | None, typer.Option(help="Of what one run says little of.")] = None
    output: Annotated[Path | None, typer.Option(help="Write everything to this file as JSON, too.")] = None

    def keywords(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("batch_sizes", "prompt_lens"):
            if name in values:
                values[name] = parse_sizes(name, values[name])
        if "workload" in values:
            values["workload"] = tuple(values["workload"].split(","))
        return values


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What to measure of kernels. Unset is left to the benchmark's default."""

    shapes: Annotated[
        str | None, typer.Option(help="A known shape, a config.json or its folder. (default: llama-3.1-8b)")
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(
            help='Some of "int4_matmul,int8_matmul,grouped_matmul,decode_attention,prefill_attention,'
            'quantized_decode_attention,quantized_prefill_attention,rope_append". (default: all)'
        ),
    ] = None
    batches: Annotated[
        str | None, typer.Option(help='Tokens of products and appends, rows of decode attention, as "1,16".')
    ] = None
    context: Annotated[int | None, typer.Option(help="Keys of a decode row.")] = None
    prompt_lens: Annotated[str | None, typer.Option(help='Of prefill attention, as "512,2048".')] = None
    page_size: Annotated[int | None, typer.Option(help="Tokens in a page.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")] = None
    tuning: Annotated[
        str | None, typer.Option(help='Of Hopper\'s kernels, timed beside their own, as "ring=3,launch_early=true".')
    ] = None
    repeats: Annotated[int | None, typer.Option(help="Rounds, of which the median counts.")] = None
    output: Annotated[Path | None, typer.Option(help="Write everything to this file as JSON, too.")] = None

    def keywords(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("batches", "prompt_lens"):
            if name in values:
                values[name] = parse_sizes(name, values[name])
        if "kernels" in values:
            values["kernels"] = tuple(values["kernels"].split(","))
        return values


@app.command()
@flatten_options
def batching(model: Model, workload: WorkloadOptions, engine: EngineOptions, as_json: Json = False) -> None:
    """Continuous against static batching, and a paged against a static cache, on one workload. --json prints a line for
    each of the four runs."""
    keywords = workload.keywords() | engine.keywords()
    for decided in ("prefix_caching", "generation_config"):  # off in every mode; every request is greedy
        keywords.pop(decided, None)
    with ProgressDisplay() as progress, leaving_at_interrupt(progress):
        progress("import jax", 0, None)
        select_platform(engine.platform, engine.memory_fraction)
        check_devices(engine.platform)
        from jaxserve.bench.batching import run
        from jaxserve.bench.report import print_batching

        rows = run(model, on_progress=progress, **keywords)
    if as_json:
        for row in rows:
            write_answer(json.dumps(row) + "\n")
    else:
        print_batching(rows)


@app.command()
@flatten_options
def engine(model: Model, offline: OfflineOptions, engine: EngineOptions, as_json: Json = False) -> None:
    """Latency, decode, prefill and throughput of the engine alone, each beside what the device can do at best. --json
    prints a line for each measurement, as it is made."""
    keywords = offline.keywords() | engine.keywords()
    keywords.pop("prefix_caching", None)  # it is off
    with ProgressDisplay() as progress, leaving_at_interrupt(progress):
        progress("import jax", 0, None)
        select_platform(engine.platform, engine.memory_fraction)
        check_devices(engine.platform)
        from jaxserve.bench.engine import run
        from jaxserve.bench.report import print_engine

        on_row = (lambda row: write_answer(json.dumps(row) + "\n")) if as_json else None
        rows = run(model, on_progress=progress, on_row=on_row, **keywords)
    if not as_json:
        print_engine(rows)


@app.command()
@flatten_options
def kernels(options: KernelOptions, platform: Platform = None, as_json: Json = False) -> None:
    """Each kernel against its reference and what XLA has of its own, in the shapes of a model's layers, each beside
    what the device can do at best. --json prints a line for each measurement, as it is made."""
    with ProgressDisplay() as progress, leaving_at_interrupt(progress):
        progress("import jax", 0, None)
        select_platform(platform)
        check_devices(platform)
        from jaxserve.bench.kernels import parse_tuning, run
        from jaxserve.bench.report import print_kernels

        keywords = options.keywords()
        if "tuning" in keywords:
            keywords["tuning"] = parse_tuning(keywords["tuning"])
        on_row = (lambda row: write_answer(json.dumps(row) + "\n")) if as_json else None
        rows = run(on_progress=progress, on_row=on_row, **keywords)
    if not as_json:
        print_kernels(rows)
    failed = [row for row in rows if "error" in row]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} measurements failed, the first: {failed[0]['error']}")


@app.command()
@flatten_options
def serve(model: Model, load: LoadOptions, engine: EngineOptions, as_json: Json = False) -> None:
    """A server, in a process of its own, under requests that arrive when they will (open loop), over gRPC: TTFT, ITL,
    goodput, prefix hits. --json prints a line for each server."""
    keywords: dict[str, Any] = load.keywords() | engine.keywords() | {"platform": engine.platform}
    from jaxserve.bench.report import print_rows
    from jaxserve.loadtest.run import FIGURES, run

    on_row = (lambda row: write_answer(json.dumps(row) + "\n")) if as_json else None
    rows = run(model, on_row=on_row, **keywords)
    if not as_json:
        print_rows(rows, FIGURES)


@app.command()
@flatten_options
def server(model: Model, overhead: OverheadOptions, engine: EngineOptions, as_json: Json = False) -> None:
    """What the server adds to its engine for one client, over gRPC and HTTP, and what its messages cost. --json prints
    a line for each measurement."""
    keywords: dict[str, Any] = overhead.keywords() | engine.keywords() | {"platform": engine.platform}
    select_platform(engine.platform, engine.memory_fraction)
    from jaxserve.bench.report import print_rows
    from jaxserve.loadtest.overhead import LATENCY_FIGURES, MESSAGE_FIGURES, run

    on_row = (lambda row: write_answer(json.dumps(row) + "\n")) if as_json else None
    rows = run(model, on_row=on_row, **keywords)
    if not as_json:
        print_rows([r for r in rows if r["measured"] == "latency"], LATENCY_FIGURES)
        print_rows([r for r in rows if r["measured"] == "messages"], MESSAGE_FIGURES)
