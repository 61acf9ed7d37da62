"""Prometheus metrics under the names that vLLM's dashboards use, with the prefix ``jaxserve:``.

Engine figures are read when they are scraped; request figures are recorded as the event loop delivers events, whether
or not the client has taken them yet. What is called ``perc`` is a fraction of 1, as there. Of several replicas
gauges are of each, all else is of all.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxserve.engine.core import EngineCore
from jaxserve.request import STEP_TOKEN_BOUNDS, EngineStats, Request, TokenEvent, Usage
from jaxserve.server.recent import RecentLatencies

GAUGES = {
    "num_requests_running": ("num_running", "Requests that hold an engine slot."),
    "num_requests_waiting": ("num_waiting", "Requests in the waiting queue."),
    "kv_cache_usage_perc": ("kv_cache_usage", "KV pages held / KV pages, 0 to 1."),
    "kv_page_fragmentation_perc": ("kv_fragmentation", "1 - tokens held / (pages held * page size), 0 to 1."),
}  # metric -> (field of EngineStats, help)
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("num_preemptions", "Sequences that gave their pages up and were recomputed."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens processed."),
    "generation_tokens": ("generation_tokens", "Output tokens generated."),
    "recompilations_after_ready": ("recompilations_after_ready", "Programs traced or compiled after ready: stays 0."),
}

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CHOICE_BUCKETS = (1, 2, 4, 8, 16, 32)
TOKEN_BUCKETS = tuple(2**i for i in range(18))
FINISH_REASONS = ("stop", "length", "abort", "deadline")


class ServerMetrics:
    """One server's metrics in a registry of their own. ``observe`` is the ``AsyncEngine``'s observer.

    Args:
        stats: the engine's figures; None until it is ready.
        engine: the engine, called when ``stats`` has figures.
        recent: is told of every latency, too.
    """

    def __init__(
        self, stats: Callable[[], EngineStats | None], engine: Callable[[], EngineCore], recent: RecentLatencies
    ):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, engine))
        self._recent = recent
        self._tokens_at: dict[tuple[str, int], list[float]] = {}  # unfinished choices: their first token and their last

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"jaxserve:{name}", text, registry=self.registry, buckets=buckets)

        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", LATENCY_BUCKETS_S)
        self._inter_token = _InterTokenLatency()
        self.registry.register(self._inter_token)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean of a request's tokens after its first.", LATENCY_BUCKETS_S
        )
        self._request = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS_S)
        self._queue = histogram("request_queue_time_seconds", "Arrival to admission.", REQUEST_BUCKETS_S)
        self._inference = histogram("request_inference_time_seconds", "Admission to last token.", REQUEST_BUCKETS_S)
        self._prefill = histogram("request_prefill_time_seconds", "Admission to first token.", REQUEST_BUCKETS_S)
        self._decode = histogram("request_decode_time_seconds", "First token to last.", REQUEST_BUCKETS_S)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._output_tokens = histogram("request_generation_tokens", "Output tokens of a request.", TOKEN_BUCKETS)
        self._n = histogram("request_params_n", "Completions that a request asks for.", CHOICE_BUCKETS)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of a request that says.", TOKEN_BUCKETS)
        finished = Counter("jaxserve:request_success", "Ended requests.", ["finished_reason"], registry=self.registry)
        self._finished = {reason: finished.labels(reason) for reason in FINISH_REASONS}

    def observe(self, request: Request, event: TokenEvent) -> None:
        """Records one delivered event."""
        now = time.monotonic()
        choice = (request.request_id, event.choice)
        if event.token_id is not None:
            times = self._tokens_at.get(choice)
            if times is None:
                self._tokens_at[choice] = [now, now]
                self._first_token.observe(now - request.arrival)
                self._recent.first.append(now - request.arrival)
            else:
                between, times[1] = now - times[1], now
                self._inter_token.observe(between)
                self._recent.between.append(between)
        if event.finish_reason is not None:
            times = self._tokens_at.pop(choice, None)
            self._finished[event.finish_reason].inc()
            if event.finish_reason in ("stop", "length"):  # an aborted request says nothing of the usual length
                self._request.observe(now - request.arrival)
                self._observe_phases(request, event.usage, times, now)
        if event.ends_request:
            self._n.observe(request.params.n)
            if request.params.max_tokens is not None:
                self._max_tokens.observe(request.params.max_tokens)

    def _observe_phases(self, request: Request, usage: Usage | None, times: list[float] | None, now: float) -> None:
        if usage is None:
            return
        self._prompt_tokens.observe(usage.prompt_tokens)
        self._output_tokens.observe(usage.completion_tokens)
        if times is None:
            return
        if usage.completion_tokens > 1:
            self._per_token.observe((now - times[0]) / (usage.completion_tokens - 1))
        if usage.admitted_at is None:
            return
        self._queue.observe(usage.admitted_at - request.arrival)
        self._inference.observe(now - usage.admitted_at)
        self._prefill.observe(times[0] - usage.admitted_at)
        self._decode.observe(now - times[0])


class _InterTokenLatency(Collector):
    """A histogram whose ``observe`` is one search and two additions, on one thread: it runs for every token, and the
    library's walks along the buckets and takes two locks."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self._total_s += seconds

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, LATENCY_BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "jaxserve:inter_token_latency_seconds",
            "One token to the next.",
            buckets=list(zip(bounds, accumulate(self._counts))),
            sum_value=self._total_s,
        )


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None], engine: Callable[[], EngineCore]):
        self._stats = stats
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:  # nothing to say before the engine is ready
            return
        for name, (field, text) in GAUGES.items():
            # Of several replicas each has its own, in the label that vLLM's engines have: a share cannot be summed.
            gauge = GaugeMetricFamily(f"jaxserve:{name}", text, labels=["engine"] if stats.replicas else None)
            for i, own in enumerate(stats.replicas or (stats,)):
                gauge.add_metric([str(i)] if stats.replicas else [], getattr(own, field))
            yield gauge
        for name, (field, text) in COUNTERS.items():
            yield CounterMetricFamily(f"jaxserve:{name}", text, value=getattr(stats, field))
        below = list(accumulate(stats.steps_by_size))
        bounds = [*map(floatToGoString, STEP_TOKEN_BOUNDS), "+Inf"]
        yield HistogramMetricFamily(
            "jaxserve:iteration_tokens_total",
            "Tokens that a step computes, of prompts and outputs.",
            buckets=list(zip(bounds, below)),
            sum_value=stats.step_tokens,
        )
        engine = self._engine()
        if engine.lora_config is not None:
            yield from _lora_metrics(stats, engine.lora_config.max_loras)
        labels = {
            "page_size": engine.cache_config.page_size,
            "num_pages": engine.cache_config.num_pages,
            "prefix_caching": engine.cache_config.prefix_caching,
            "dtype": engine.dtype,
            "cache_dtype": engine.cache_config.dtype,
            "max_model_len": engine.scheduler_config.max_model_len,
            "max_num_seqs": engine.scheduler_config.max_num_seqs,
        }
        info = GaugeMetricFamily("jaxserve:cache_config_info", "Always 1; the labels say.", labels=list(labels))
        info.add_metric([str(value) for value in labels.values()], 1)
        yield info


def _lora_metrics(stats: EngineStats, max_loras: int) -> Iterator[Metric]:
    """Requests of each adapter, and vLLM's one gauge, whose labels say it all and whose value is the time."""
    running = GaugeMetricFamily(
        "jaxserve:num_lora_requests_running", "Of an adapter, with a slot.", labels=["lora_name"]
    )
    waiting = GaugeMetricFamily("jaxserve:num_lora_requests_waiting", "Of an adapter, queued.", labels=["lora_name"])
    for load in stats.loras:
        running.add_metric([load.name], load.num_running)
        waiting.add_metric([load.name], load.num_waiting)
    yield running
    yield waiting
    labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    info = GaugeMetricFamily("jaxserve:lora_requests_info", "When it was scraped; the labels say.", labels=labels)
    names = (
        ",".join(load.name for load in stats.loras if load.num_running),
        ",".join(load.name for load in stats.loras if load.num_waiting),
    )
    info.add_metric([str(max_loras), *names], time.time())
    yield info
