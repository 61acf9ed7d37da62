"""``jaxserve bench serve``: a server under requests that arrive when they will."""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.bench.environment import command_line
from jaxserve.loadtest.arrivals import Arrival, poisson, read_trace
from jaxserve.loadtest.figures import figures
from jaxserve.loadtest.process import server_process
from jaxserve.loadtest.replay import replay
from jaxserve.server.client import AsyncClient

Row = dict[str, Any]
FIGURES = (
    ("load", "load"),
    ("prefix cache", "prefix_caching"),
    ("requests", "num_requests"),
    ("failed", "num_failed"),
    ("hit rate", "prefix_hit_rate"),
    ("TTFT ms p50", "ttft_p50_ms"),
    ("TTFT ms p99", "ttft_p99_ms"),
    ("ITL ms p50", "itl_p50_ms"),
    ("ITL ms p99", "itl_p99_ms"),
    ("tokens/s", "output_tokens_per_s"),
    ("goodput /s", "goodput_requests_per_s"),
    ("good", "goodput_share"),
)  # (column, key of the row)


def run(
    model: str,
    *,
    trace: Path | None = None,
    request_rate: float | None = None,
    num_requests: int = 100,
    speed: float = 1.0,
    max_prompt: int = 1024,
    max_output: int = 256,
    seed: int = 0,
    compare_prefix_cache: bool = False,
    platform: str | None = None,
    output: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
    **options: Any,
) -> list[Row]:
    """A row for each server: one, or with ``compare_prefix_cache`` one with and one without the prefix cache.

    Args:
        trace: a file of ``read_trace``, of which the first ``num_requests`` are sent.
        speed: a trace's requests come so many times as fast.
        request_rate: or so many a second, at random moments (``poisson``).
        options: keywords of ``Engine.from_pretrained``.

    Raises:
        ValueError: neither or both of trace and rate, a file that is no trace, a request that the model cannot take.
        RuntimeError: the server cannot be started.
    """
    if (trace is None) == (request_rate is None):
        raise ValueError(f"trace={trace} and request_rate={request_rate}: give one of them")
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests} must be at least 1")
    if not 0 < speed < float("inf"):
        raise ValueError(f"speed={speed:g} is not a finite number more than 0")
    if trace is not None:
        arrivals = [replace(a, at_s=a.at_s / speed) for a in read_trace(trace)[:num_requests]]
        load = trace.name
        asked: dict[str, Any] = {"trace": trace.name, "num_requests": num_requests, "speed": speed}
    else:
        assert request_rate is not None
        arrivals = poisson(num_requests, request_rate, seed=seed, max_prompt=max_prompt, max_output=max_output)
        load = f"poisson {request_rate:g}/s"
        asked = {"request_rate": request_rate, "num_requests": num_requests, "max_prompt": max_prompt}
        asked |= {"max_output": max_output, "seed": seed}
    command = command_line("serve", model, asked | options) + " --compare-prefix-cache" * compare_prefix_cache
    rows = []
    caches = (True, False) if compare_prefix_cache else (options.pop("prefix_caching", True),)
    for prefix_caching in caches:
        with server_process(model, options | {"prefix_caching": prefix_caching}, platform) as served:
            row = served.about | {"command": command, "load": load, "prefix_caching": prefix_caching}
            row |= asyncio.run(_measured(served.target, arrivals))
        rows.append(row | {"load_average": round(os.getloadavg()[0], 2)})
        if output is not None:
            output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if on_row is not None:
            on_row(rows[-1])
    return rows


async def _measured(target: str, arrivals: Sequence[Arrival]) -> Row:
    async with AsyncClient(target) as client:
        info = await client.model_info()
        for i, arrival in enumerate(arrivals):
            if (total := arrival.prompt_len + arrival.num_output_tokens) > info.max_model_len:
                raise ValueError(
                    f"request {i}: {arrival.prompt_len} prompt and {arrival.num_output_tokens} output tokens are "
                    f"{total}, max_model_len={info.max_model_len}"
                )
        before = await client.get_load()
        answers = await replay(client, arrivals, info.vocab_size)
        after = await client.get_load()
        queries = after.prefix_cache_queries - before.prefix_cache_queries
        hits = after.prefix_cache_hits - before.prefix_cache_hits
        return {
            "model": info.model_name,
            "dtype": info.dtype,
            "max_model_len": info.max_model_len,
            **figures(answers),
            "prefix_hit_rate": round(hits / queries, 4) if queries else 0.0,
            "num_preemptions": after.num_preemptions - before.num_preemptions,
            "recompilations": after.recompilations_after_ready,
        }
