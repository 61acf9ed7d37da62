"""A span of OpenTelemetry for each request, exported over OTLP gRPC. Imported only where spans are asked for: what it
imports is the extra ``otel``.

Name, kind and attributes of a span are vLLM's, with their present names in OpenTelemetry's conventions for generative
AI beside them where those differ. Times are seconds. No text is in a span.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxserve import __version__
from jaxserve.engine.event_stream import SlowReaderError
from jaxserve.request import FinishReason, Request, TokenEvent, Usage

logger = logging.getLogger(__name__)

SPAN_NAME = "llm_request"
FLUSH_TIMEOUT_S = 2.0  # for the collector to take the last spans when the server ends
EXPORT_TIMEOUT_S = 10.0  # of one batch, its retries included: for so long others wait behind it
BATCH_SIZE = 64  # spans: encoding them takes the interpreter for some milliseconds, in which no token is sent
QUEUE_SIZE = 4096  # spans that wait; more are dropped


def otlp_exporter(endpoint: str) -> SpanExporter:
    """To a collector at an address that ``trace_context.check_endpoint`` takes. Connects when there is a span."""
    is_plain = urlsplit(endpoint).scheme != "https"
    return OTLPSpanExporter(endpoint=endpoint, insecure=is_plain, timeout=EXPORT_TIMEOUT_S)


@dataclass
class _Progress:
    """What is noted of an unfinished request."""

    request: Request  # not any of its id: another one may come, and be refused for it
    first_at: float | None = None  # when its first token came, monotonic seconds
    num_tokens: int = 0  # of the choices that have ended
    reasons: dict[int, FinishReason] = field(default_factory=dict)  # by choice


class RequestTracer:
    """One server's spans. ``observe`` and ``observe_failure`` are the observers of an ``AsyncEngine``.

    A span is made whole when its request ends, and handed to a thread that exports: no request waits for a collector,
    and a token that is neither the first nor the last costs a comparison.

    Args:
        exporter: gets batches of spans, in a thread; closed by ``close``.
        model: under which name the model answers.
    """

    def __init__(self, exporter: SpanExporter, model: Callable[[], str]):
        self._exporter = _StoppableExporter(exporter)
        self._model = model
        self._open: dict[str, _Progress] = {}
        own = Resource({"service.name": "jaxserve", "service.version": __version__})
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say is more than what we would.
        resource = Resource.create(own.merge(OTELResourceDetector().detect()).attributes)
        # Neither the process's provider nor ended with the process: both are the server's own.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=QUEUE_SIZE, max_export_batch_size=BATCH_SIZE)
        )
        self._tracer = self._provider.get_tracer("jaxserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, request: Request, event: TokenEvent) -> None:
        """Notes one delivered event; the last of a request makes its span."""
        if event.index != 0 and event.finish_reason is None:
            return
        now = time.monotonic()
        progress = self._open.setdefault(request.request_id, _Progress(request))
        if event.token_id is not None and progress.first_at is None:
            progress.first_at = now
        if event.finish_reason is None:
            return
        progress.reasons[event.choice] = event.finish_reason
        if event.usage is not None:
            progress.num_tokens += event.usage.completion_tokens
        if event.ends_request:
            del self._open[request.request_id]
            attributes = self._of_request(request) | _of_answer(request, progress, event.usage, now)
            failure = "deadline_exceeded" if event.finish_reason == "deadline" else None
            self._end(request, now, attributes, failure, "the deadline passed")

    def observe_failure(self, request: Request, error: Exception) -> None:
        """The span of a request that the engine refused, or that ended with it."""
        if isinstance(error, SlowReaderError):  # aborted: its last event is still to come
            return
        progress = self._open.get(request.request_id)
        if progress is not None and progress.request is request:
            del self._open[request.request_id]
        now = time.monotonic()
        attributes = self._of_request(request) | {"gen_ai.latency.e2e": now - request.arrival}
        self._end(request, now, attributes, type(error).__name__, str(error))

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Exports what is left; what the collector has not taken after ``timeout_s`` is dropped. Blocks so long."""
        flushing = threading.Thread(target=self._provider.shutdown, name="jaxserve-spans", daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        if flushing.is_alive():
            logger.warning("the last spans were dropped: their collector did not take them within %g s", timeout_s)
            self._exporter.stop()

    def _end(
        self, request: Request, now: float, attributes: dict[str, Any], error_type: str | None, description: str
    ) -> None:
        end_ns = time.time_ns()
        start_ns = end_ns - int((now - request.arrival) * 1e9)
        parent = self._propagator.extract(dict(request.trace_context), context=Context())
        span = self._tracer.start_span(
            SPAN_NAME, context=parent, kind=SpanKind.SERVER, attributes=attributes, start_time=start_ns
        )
        if error_type is not None:
            span.set_attribute("error.type", error_type)
            span.set_status(Status(StatusCode.ERROR, description))
        span.end(end_ns)

    def _of_request(self, request: Request) -> dict[str, Any]:
        found: dict[str, Any] = {
            "gen_ai.request.id": request.request_id,
            "gen_ai.response.model": self._model() if request.adapter is None else request.adapter.name,
        }
        if request.pooling is not None:
            return found | {"gen_ai.operation.name": "embeddings"}
        params = request.params
        return found | {
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": request.max_total_len - len(request.prompt_token_ids),
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }


def _of_answer(request: Request, progress: _Progress, usage: Usage | None, now: float) -> dict[str, Any]:
    num_prompt = len(request.prompt_token_ids)
    found: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": num_prompt,
        "gen_ai.usage.input_tokens": num_prompt,
        "gen_ai.usage.completion_tokens": progress.num_tokens,
        "gen_ai.usage.output_tokens": progress.num_tokens,
        "gen_ai.usage.num_sequences": request.params.n,
        "gen_ai.response.finish_reasons": [reason for _, reason in sorted(progress.reasons.items())],
        "gen_ai.latency.e2e": now - request.arrival,
    }
    if usage is not None:
        found["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    first, admitted = progress.first_at, None if usage is None else usage.admitted_at
    if first is not None:
        found["gen_ai.latency.time_to_first_token"] = first - request.arrival
        found["gen_ai.latency.time_in_model_decode"] = now - first
    if admitted is not None:
        found["gen_ai.latency.time_in_queue"] = admitted - request.arrival
        found["gen_ai.latency.time_in_model_inference"] = now - admitted
        if first is not None:
            found["gen_ai.latency.time_in_model_prefill"] = first - admitted
    return found


class _StoppableExporter(SpanExporter):
    """``inner``, until ``stop``: what comes later is dropped without a word."""

    def __init__(self, inner: SpanExporter):
        self._inner = inner
        self._is_over = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE if self._is_over else self._inner.export(spans)

    def stop(self) -> None:
        """Ends an export that runs, too."""
        self._is_over = True
        self._inner.shutdown()

    def shutdown(self) -> None:
        if not self._is_over:
            self.stop()
