"""Spans of requests: what is in one, whose it is, and that no collector can hold a request or the server's end up."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest
import websockets.asyncio.client as ws
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jaxserve import __version__
from jaxserve.cli.app import run
from jaxserve.engine.async_engine import DuplicateRequestError, EngineFailedError
from jaxserve.engine.event_stream import SlowReaderError
from jaxserve.request import FinishReason, LoadedAdapter, Request, TokenEvent, Usage
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.app import Server
from jaxserve.server.client import Client, batch_request
from jaxserve.server.options import ServerOptions
from jaxserve.server.tracing import FLUSH_TIMEOUT_S, RequestTracer
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import QUEUE_TIME_S, FakeEngine, expected_text
from tests.server.test_process import EXIT_S, end_of, process
from tests.server.test_security import PEM
from tests.server.test_service import refused, text_of

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
LATENCY = "gen_ai.latency."


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector on a free port. While ``may_answer`` is clear, it takes spans and says nothing."""

    def __init__(self, with_tls: bool = False):
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        if with_tls:
            pair = ((PEM / "server.key").read_bytes(), (PEM / "server.pem").read_bytes())
            port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        else:
            port = self._server.add_insecure_port("127.0.0.1:0")
        self.url = f"{'https' if with_tls else 'http'}://127.0.0.1:{port}"
        self._server.start()

    def Export(self, request, context):
        self.may_answer.wait(TIMEOUT_S)
        for resource in request.resource_spans:
            self.resources.append(attributes_of(resource.resource))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def close(self) -> None:
        self.may_answer.set()
        self._server.stop(None).wait(TIMEOUT_S)


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes_of(message: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(v) for v in found.values] if kind == "array_value" else found

    return {pair.key: value(pair.value) for pair in message.attributes}


class Traced:
    """A tracer that exports to memory. ``finished`` closes it."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.tracer = RequestTracer(self._exporter, lambda: "served")

    def finished(self) -> list[ReadableSpan]:
        self.tracer.close(TIMEOUT_S)
        return list(self._exporter.get_finished_spans())


def request_of(request_id: str = "r", **fields: Any) -> Request:
    given: dict[str, Any] = {
        "request_id": request_id,
        "prompt_token_ids": (1, 2, 3),
        "params": SamplingParams(max_tokens=8, temperature=0.5, top_p=0.25),
        "max_total_len": 11,
        "stop_token_ids": (),
        "seed": 2**64 - 1,
        "arrival": time.monotonic() - 10.0,
    }
    return Request(**given | fields)


def attributes(span: ReadableSpan | Span) -> Mapping[str, Any]:
    if isinstance(span, Span):
        return attributes_of(span)
    assert span.attributes is not None
    return span.attributes


def test_what_is_in_a_span():
    traced = Traced()
    params = SamplingParams(max_tokens=8, temperature=0.5, top_p=0.25, n=2)
    request = request_of(params=params, trace_context=(("traceparent", SAMPLED), ("tracestate", "a=b")))
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1, admitted_at=request.arrival + 4.0)
    before_ns = time.time_ns()
    for event in (
        TokenEvent("r", 0, 7),
        TokenEvent("r", 0, 7, choice=1),
        TokenEvent("r", 1, 8),
        TokenEvent("r", 1, 8, choice=1, finish_reason="length", usage=replace(usage, completion_tokens=5), num_open=1),
        TokenEvent("r", 2, 9, finish_reason="stop", usage=usage),
    ):
        traced.tracer.observe(request, event)
    (span,) = traced.finished()
    assert (span.name, span.kind, span.status.status_code) == ("llm_request", SpanKind.SERVER, StatusCode.UNSET)
    assert span.context is not None and span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE_ID, 16), int(PARENT_ID, 16))
    assert span.context.trace_state.get("a") == "b"
    found = dict(attributes(span))
    times = {name.removeprefix(LATENCY): found.pop(name) for name in list(found) if name.startswith(LATENCY)}
    assert found == {
        "gen_ai.request.id": "r",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.response.model": "served",
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.completion_tokens": 7,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
    }
    assert times["time_in_queue"] == pytest.approx(4.0)
    assert 10.0 <= times["time_to_first_token"] <= times["e2e"] < 10.0 + TIMEOUT_S
    assert times["time_in_model_prefill"] == pytest.approx(times["time_to_first_token"] - 4.0)
    assert times["time_in_model_decode"] == pytest.approx(times["e2e"] - times["time_to_first_token"])
    assert times["time_in_model_inference"] == pytest.approx(times["e2e"] - 4.0)
    assert span.start_time is not None and span.end_time is not None
    assert span.start_time <= before_ns <= span.end_time
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(times["e2e"], abs=1e-6)
    assert set(times) == {
        *("e2e", "time_in_queue", "time_to_first_token"),
        *("time_in_model_prefill", "time_in_model_decode", "time_in_model_inference"),
    }


def test_an_end_without_tokens_and_an_embedding():
    traced = Traced()
    usage = Usage(prompt_tokens=3, completion_tokens=0, cached_tokens=0)
    ends: list[tuple[str, FinishReason]] = [("gone", "abort"), ("late", "deadline")]
    for name, reason in ends:
        traced.tracer.observe(request_of(name), TokenEvent(name, 0, None, finish_reason=reason, usage=usage))
    sql = LoadedAdapter(name="sql", slot=0, generation=1, rank=4)
    embedding = request_of("vector", pooling="mean", adapter=sql)
    traced.tracer.observe(embedding, TokenEvent("vector", 0, None, finish_reason="stop", usage=usage))
    gone, late, vector = traced.finished()
    assert [span.status.status_code for span in (gone, late, vector)] == [
        *(StatusCode.UNSET, StatusCode.ERROR, StatusCode.UNSET)
    ]
    assert attributes(gone)["gen_ai.response.finish_reasons"] == ("abort",)
    assert attributes(late)["error.type"] == "deadline_exceeded"
    assert not {f"{LATENCY}time_in_queue", f"{LATENCY}time_to_first_token"} & set(attributes(gone))
    assert attributes(vector)["gen_ai.operation.name"] == "embeddings"
    assert attributes(vector)["gen_ai.response.model"] == "sql"
    assert "gen_ai.request.max_tokens" not in attributes(vector)


def test_failures():
    traced = Traced()
    running, twin, slow = request_of("r"), request_of("r"), request_of("slow")
    usage = Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=0)
    traced.tracer.observe(running, TokenEvent("r", 0, 7))
    traced.tracer.observe_failure(twin, DuplicateRequestError("request_id", "'r' is queued or running"))
    traced.tracer.observe(running, TokenEvent("r", 1, 8, finish_reason="stop", usage=usage))
    traced.tracer.observe_failure(slow, SlowReaderError("too slow"))  # its abort tells
    traced.tracer.observe(slow, TokenEvent("slow", 1, None, finish_reason="abort", usage=usage))
    lost = request_of("lost")
    traced.tracer.observe(lost, TokenEvent("lost", 0, 7))
    traced.tracer.observe_failure(lost, EngineFailedError("the engine failed: no device"))
    refusal, whole, aborted, failed = traced.finished()
    assert attributes(refusal)["error.type"] == "DuplicateRequestError"
    assert refusal.status.description == "request_id: 'r' is queued or running"
    assert f"{LATENCY}time_to_first_token" in attributes(whole)  # of its own first token
    assert attributes(aborted)["gen_ai.response.finish_reasons"] == ("abort",)
    assert (attributes(failed)["error.type"], failed.status.status_code) == ("EngineFailedError", StatusCode.ERROR)


@pytest.mark.parametrize(
    ("given", "is_made", "is_child"),
    [
        (SAMPLED, True, True),
        (SAMPLED[:-1] + "0", False, False),  # whoever calls has not sampled it
        ("no trace", True, False),
        (f"00-{'0' * 32}-{PARENT_ID}-01", True, False),
        (f"00-{TRACE_ID}-{PARENT_ID}", True, False),
        ("\xff" * 2000, True, False),
    ],
)
def test_whose_it_is(given: str, is_made: bool, is_child: bool):
    traced = Traced()
    request = request_of(trace_context=(("traceparent", given),))
    traced.tracer.observe(request, TokenEvent("r", 0, 7, finish_reason="stop"))
    spans = traced.finished()
    assert len(spans) == is_made
    assert all((span.parent is not None) == is_child for span in spans)


async def test_every_way_in_from_end_to_end(collector: Collector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    header = {"traceparent": SAMPLED, "tracestate": "a=b"}
    async with (
        serving(http_port=0, otlp_traces_endpoint=collector.url) as s,
        httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S, headers=header) as http,
        grpc.aio.insecure_channel(s.target) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        own = tuple(header.items())
        generate = pb.GenerateRequest(request_id="one", text="abc", sampling=pb.SamplingParams(max_tokens=4))
        assert [c async for c in stub.Generate(generate, metadata=own)]
        batch = [batch_request(name, "abc", max_tokens=2) for name in ("two", "three")]
        assert [c async for c in stub.GenerateBatch(iter(batch), metadata=own)]
        await stub.Embed(pb.EmbedRequest(request_id="four", text="abc"), metadata=own)
        body = {"request_id": "five", "max_tokens": 2}
        assert (await http.post("/v1/completions", json={**body, "prompt": ["a", "b"]})).status_code == 200
        chat = {"messages": [{"role": "user", "content": "a"}], "stream": True}
        await http.post("/v1/chat/completions", json={**body, **chat, "request_id": "six"})
        await http.post("/v1/embeddings", json={"input": "a"})
        await http.post("/generate/stream", json={**body, "prompt": "a", "request_id": "seven"})
        url = s.url.replace("http", "ws") + "/generate/ws"
        async with ws.connect(url, additional_headers=header) as socket:
            await socket.send(json.dumps({"prompt": "a", "max_tokens": 1, "request_id": "eight"}))
            await socket.recv()
        await text_of(s.client.generate("abc", request_id="mine", max_tokens=2))
        assert (await http.post("/v1/completions", json={"prompt": "a", "top_p": 2})).status_code == 400
        num_requests = len(s.engine.requests)
    spans = {attributes_of(span)["gen_ai.request.id"]: span for span in collector.spans}
    assert len(spans) == len(collector.spans) == num_requests == 11  # all of them when the server has ended
    mine = spans.pop("mine")
    assert mine.trace_id.hex() != TRACE_ID and mine.parent_span_id == b""
    assert all((x.trace_id.hex(), x.parent_span_id.hex(), x.trace_state) == (TRACE_ID, PARENT_ID, "a=b")
               for x in spans.values())  # fmt: skip
    one = spans["one"]
    assert (one.name, one.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    found = attributes_of(one)
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (3, 4)
    assert found[f"{LATENCY}time_in_queue"] == QUEUE_TIME_S and found["gen_ai.response.model"] == "fake"
    assert "abc" not in str(one)  # no texts of anybody's
    resource = collector.resources[0]
    assert (resource["service.name"], resource["service.version"]) == ("ours", __version__)
    assert resource["deployment.environment.name"] == "test"


async def test_refused_late_and_left_requests_have_spans(collector: Collector):
    engine = endless_engine(max_num_waiting=1)
    async with serving(engine, otlp_traces_endpoint=collector.url, served_model_names=("nice",)) as s:
        left = s.client.generate("a", request_id="left")
        await anext(left)
        await refused(s.client.generate("a", request_id="refused"))
        await left.aclose()
        assert await s.is_idle()
        await refused(s.client.generate("a", request_id="late", timeout_s=0.1))
        assert await s.is_idle()
        lost = s.client.generate("a", request_id="lost")
        await anext(lost)
        engine.fail.set()
        await refused(lost)
    found = {a["gen_ai.request.id"]: a for a in map(attributes_of, collector.spans)}
    assert set(found) == {"left", "refused", "late", "lost"}  # the refused one has a span for each time it was tried
    assert all(a["gen_ai.response.model"] == "nice" for a in found.values())
    assert found["left"]["gen_ai.response.finish_reasons"] == ["abort"]
    # Either the engine sees the deadline first, or the client's leaving.
    assert found["late"]["gen_ai.response.finish_reasons"] in (["deadline"], ["abort"])
    assert found["refused"]["error.type"] == "QueueFullError"
    assert found["lost"]["error.type"] == "EngineFailedError"
    errors = {attributes_of(span)["gen_ai.request.id"]: span.status.message for span in collector.spans}
    assert "the device was lost" in errors["lost"]
    assert collector.resources[0]["service.name"] == "jaxserve"


async def test_a_collector_with_tls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(PEM / "ca.pem"))
    collector = Collector(with_tls=True)
    async with serving(otlp_traces_endpoint=collector.url) as s:
        await text_of(s.client.generate("a", request_id="r", max_tokens=1))
    collector.close()
    assert [attributes_of(span)["gen_ai.request.id"] for span in collector.spans] == ["r"]


@pytest.fixture(params=["refuses", "hangs"])
def absent(request: pytest.FixtureRequest, collector: Collector) -> Iterator[str]:
    """The address of what will never take a span."""
    if request.param == "hangs":
        collector.may_answer.clear()
        yield collector.url
    else:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_no_collector_holds_anything_up(absent: str, caplog: pytest.LogCaptureFixture):
    longest = longest_elsewhere = 0.0
    has_ended = threading.Event()
    async with serving(endless_engine(step_delay_s=0.0), otlp_traces_endpoint=absent) as s:

        async def watch() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)

        def watch_elsewhere() -> None:
            """What a busy machine takes from every thread of this process."""
            nonlocal longest_elsewhere
            while not has_ended.is_set():
                before = time.monotonic()
                time.sleep(0.01)
                longest_elsewhere = max(longest_elsewhere, time.monotonic() - before)

        threading.Thread(target=watch_elsewhere, daemon=True).start()
        watching = asyncio.create_task(watch())
        for i in range(0, 120, 20):  # more than a batch of spans
            texts = [text_of(s.client.generate(f"p{i + j}", max_tokens=3)) for j in range(20)]
            assert await asyncio.gather(*texts) == [expected_text(f"p{i + j}", 3) for j in range(20)]
        watching.cancel()
        has_ended.set()
        assert longest < longest_elsewhere + FLUSH_TIMEOUT_S / 2  # the loop waited for nobody
        started = time.monotonic()
    assert time.monotonic() - started < FLUSH_TIMEOUT_S + 3.0
    lost = [record for record in caplog.records if record.name == "jaxserve.server.tracing"]
    assert [record.levelname for record in lost] == ["WARNING"]
    assert len(caplog.records) < 8 and not any(record.exc_info for record in caplog.records)


def test_a_process_flushes_at_its_end(collector: Collector):
    with process("--otlp-traces-endpoint", collector.url) as (server, port):
        with Client(f"127.0.0.1:{port}") as client:
            assert "".join(c.text for c in client.generate("a", max_tokens=9, request_id="r")) == expected_text("a", 9)
        server.send_signal(signal.SIGTERM)
        assert end_of(server) == (0, "")
    assert [attributes_of(span)["gen_ai.request.id"] for span in collector.spans] == ["r"]


def test_a_process_ends_though_what_listens_never_speaks():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with process("--otlp-traces-endpoint", f"http://127.0.0.1:{listener.getsockname()[1]}") as (server, port):
            with Client(f"127.0.0.1:{port}") as client:
                assert list(client.generate("a", max_tokens=9))
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            status, errors = end_of(server)
            assert status == 0 and time.monotonic() - started < FLUSH_TIMEOUT_S + EXIT_S
            assert f"did not take them within {FLUSH_TIMEOUT_S:g} s" in errors and "Traceback" not in errors


async def test_without_the_extra_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch, capsys):
    def distribution(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    options = ServerOptions(port=0, otlp_traces_endpoint="http://127.0.0.1:4317")
    built = []
    told = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-grpc, not installed here: pip install 'jaxserve"
    with pytest.raises(ValueError, match=re.escape(told)):
        await Server(lambda: built.append(1) or FakeEngine(), options).start()
    assert not built
    # Before the model is looked for, or downloaded.
    assert run(["serve", "no/such-model", "--otlp-traces-endpoint=http://127.0.0.1:4317"]) == 2
    assert told in capsys.readouterr().err


def test_without_the_option_nothing_of_it_is_imported():
    code = (
        "import asyncio, sys\n"
        "from jaxserve.server.app import Server\n"
        "from jaxserve.server.options import ServerOptions\n"
        "from tests.server.fake_engine import FakeEngine, byte_tokenizer\n"
        "async def main():\n"
        "    server = Server(lambda: FakeEngine(tokenizer=byte_tokenizer()), ServerOptions(port=0, http_port=0))\n"
        "    await server.start()\n"
        "    await server.ready()\n"
        "    await server.close()\n"
        "asyncio.run(main())\n"
        "found = [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]\n"
        "assert not found and 'jaxserve.server.tracing' not in sys.modules, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
