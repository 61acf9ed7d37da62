"""``jaxserve bench``: measurements of this machine, as a table or JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.cli.loading import leaving_at_interrupt, select_platform
from jaxserve.cli.options import EngineOptions, Json, Model, flatten_options, parse_sizes
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
        select_platform(engine.platform)
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
        select_platform(engine.platform)
        from jaxserve.bench.engine import run
        from jaxserve.bench.report import print_engine

        on_row = (lambda row: write_answer(json.dumps(row) + "\n")) if as_json else None
        rows = run(model, on_progress=progress, on_row=on_row, **keywords)
    if not as_json:
        print_engine(rows)
