"""``jaxserve eval``: how good a model is."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli.loading import open_engine
from jaxserve.cli.options import EngineOptions, Json, Model, flatten_options
from jaxserve.cli.terminal import ProgressDisplay, print_table, write_answer

app = typer.Typer(help="Measure how good a model is, and print a table or JSON.")


@app.callback()
def _group() -> None:
    """Makes the only command a subcommand."""


@app.command()
@flatten_options
def perplexity(
    model: Model,
    text: Annotated[Path, typer.Option(help="A file of text in UTF-8.")],
    engine: EngineOptions,
    max_tokens: Annotated[int | None, typer.Option(help="Of the text, its first ones. (default: all)")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens seen at once. (default: 1024, or what fits)")] = None,
    stride: Annotated[int | None, typer.Option(help="From a window to the next. (default: half a window)")] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text by a sliding window: every token but the first is predicted once. --json prints a line."""
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: at least 2 are needed")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"text: {text} is not UTF-8: {e.reason} at byte {e.start}") from None
    with open_engine(model, engine) as e, ProgressDisplay() as progress:
        from jaxserve.bench.perplexity import perplexity as measure

        if e.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer")
        ids = e.tokenizer.encode(content)[:max_tokens]
        found = measure(e, ids, window=window, stride=stride, on_progress=progress)
    row = {"model": model, "text": str(text)} | dataclasses.asdict(found)
    if as_json:
        write_answer(json.dumps(row) + "\n")
    else:
        print_table(row | {"perplexity": f"{found.perplexity:.4f}", "nll": f"{found.nll:.5f} nats a token"})
