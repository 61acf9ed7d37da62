"""``jaxserve bench``: measurements of this machine, as a table or JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from jaxserve.cli.loading import leaving_at_interrupt, select_platform
from jaxserve.cli.options import EngineOptions, Json, Model, flatten_options
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


@app.callback()
def _group() -> None:
    """Keeps the name of a group's only command in the command line."""


@app.command()
@flatten_options
def batching(model: Model, workload: WorkloadOptions, engine: EngineOptions, as_json: Json = False) -> None:
    """Continuous against static batching, and a paged against a static cache, on one workload. --json prints a line for
    each of the four runs."""
    keywords = workload.keywords() | engine.keywords()
    keywords.pop("prefix_caching", None)  # it is off in every mode
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
