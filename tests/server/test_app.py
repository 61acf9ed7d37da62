"""One server in this process: health, reflection, drain, ports, metrics."""

import asyncio
import threading
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.async_engine import EngineFailedError
from jaxserve.server.app import SERVICE_NAME, ServeError, Server, serve
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.options import ServerOptions
from jaxserve.server.v1 import inference_pb2 as pb
from tests.engine.test_async_engine import stopped_clock
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import QUEUE_TIME_S, FakeEngine, byte_tokenizer, expected_text
from tests.server.test_service import refused, text_of

Health = health_pb2.HealthCheckResponse


async def health(target: str) -> dict[str, int]:
    async with grpc.aio.insecure_channel(target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=Health.FromString,
        )
        return {name: (await check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", SERVICE_NAME)}


def watched(channel: grpc.aio.Channel) -> AsyncIterator[Any]:
    """The service's health, now and when it changes."""
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=Health.FromString,
    )
    return aiter(watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME)))


async def test_health_follows_loading_ready_and_drain():
    may_build = threading.Event()
    async with serving(may_build=may_build, wait_ready=False) as s:
        assert set((await health(s.target)).values()) == {Health.NOT_SERVING}
        with pytest.raises(TimeoutError, match="not ready"):
            await s.client.wait_ready(0.05)
        waiting = asyncio.ensure_future(s.client.wait_ready(TIMEOUT_S))
        may_build.set()
        await s.server.ready()
        await waiting
        assert set((await health(s.target)).values()) == {Health.SERVING}
        assert await s.server.drain() is True
        assert set((await health(s.target)).values()) == {Health.NOT_SERVING}


async def test_wait_ready_of_a_server_that_is_not_there(taken_port):
    def wait():
        with Client("127.0.0.1:1") as client, pytest.raises(TimeoutError, match="not ready"):
            client.wait_ready(0.1)

    await asyncio.to_thread(wait)
    async with AsyncClient(f"127.0.0.1:{taken_port}") as client:
        with pytest.raises(TimeoutError, match="not ready"):
            await client.wait_ready(0.1)


async def test_reflection_names_the_services_and_gives_the_proto():
    async with serving() as s, grpc.aio.insecure_channel(s.target) as channel:
        reflect = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = (
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        )
        answers = [answer async for answer in reflect(iter(requests))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {"jaxserve.v1.Inference", "grpc.health.v1.Health"} <= names
        assert b"jaxserve.v1" in answers[1].file_descriptor_response.file_descriptor_proto[0]


async def test_drain_refuses_new_requests_and_lets_running_ones_finish():
    async with serving(endless_engine(), drain_timeout_s=TIMEOUT_S) as s:
        stream = s.client.generate("a", max_tokens=200)
        text = (await anext(stream)).text
        draining = asyncio.ensure_future(s.server.drain())
        while s.server.engine.state == "ready":
            await asyncio.sleep(0)  # the drain starts within a few turns of this loop
        assert (await refused(s.client.generate("b"))).code() == grpc.StatusCode.UNAVAILABLE
        assert text + await text_of(stream) == expected_text("a", 200)
        assert await draining is True


async def test_drain_aborts_at_its_limit_and_says_so():
    async with serving(endless_engine(), drain_timeout_s=0.05) as s:
        chunks, began = [], asyncio.Event()

        async def read():
            async for chunk in s.client.generate("a"):
                chunks.append(chunk)
                began.set()

        reading = asyncio.ensure_future(refused(read()))
        await began.wait()
        assert await s.server.drain() is False
        assert (await reading).code() == grpc.StatusCode.UNAVAILABLE
        assert chunks[-1].finish_reason == "abort" and s.engine.idle.is_set()


async def test_health_is_not_serving_once_the_engine_died():
    async with serving(endless_engine()) as s, grpc.aio.insecure_channel(s.target) as channel:
        statuses = watched(channel)
        assert (await anext(statuses)).status == Health.SERVING
        stream = s.client.generate("a")
        await anext(stream)
        s.engine.fail.set()
        assert (await anext(statuses)).status == Health.NOT_SERVING
        assert set((await health(s.target)).values()) == {Health.NOT_SERVING}


async def test_serve_stops_when_told_and_raises_when_the_engine_dies():
    async def run(engine, act):
        stop, ready = asyncio.Event(), asyncio.Future()
        task = asyncio.ensure_future(
            serve(lambda: engine, ServerOptions(port=0), stop=stop, on_ready=lambda server: ready.set_result(server))
        )
        server = await ready
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            await act(client, stop)
        return await asyncio.wait_for(task, TIMEOUT_S)

    async def stop_it(client, stop):
        assert await text_of(client.generate("a", max_tokens=3)) == expected_text("a", 3)
        stop.set()

    engine = FakeEngine(tokenizer=byte_tokenizer())
    assert await run(engine, stop_it) is None
    assert engine.closed

    async def break_it(client, stop):
        stream = client.generate("a")
        await anext(stream)
        broken.fail.set()
        assert (await refused(stream)).code() == grpc.StatusCode.UNAVAILABLE

    broken = endless_engine()
    with pytest.raises(EngineFailedError, match="the device was lost"):
        await run(broken, break_it)

    async def break_it_while_it_drains(client, stop):
        stream = client.generate("a")
        await anext(stream)
        stop.set()
        while (await client.server_info()).state == pb.SERVER_STATE_READY:
            pass  # each turn is a call, and the drain begins within a few
        broken.fail.set()
        assert (await refused(stream)).code() == grpc.StatusCode.UNAVAILABLE

    broken = endless_engine()
    with pytest.raises(EngineFailedError, match="the device was lost"):
        await run(broken, break_it_while_it_drains)


async def test_a_hanging_step_is_unavailable_everywhere(monkeypatch: pytest.MonkeyPatch):
    passed_s = stopped_clock(monkeypatch)
    async with (
        serving(endless_engine(), step_timeout_s=0.3, http_port=0) as s,
        httpx2.AsyncClient(base_url=s.url, timeout=TIMEOUT_S) as http,
        grpc.aio.insecure_channel(s.target) as channel,
    ):
        statuses = watched(channel)
        assert (await anext(statuses)).status == Health.SERVING
        stream = s.client.generate("a")
        await anext(stream)
        asking = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10**5}))
        while len(s.engine.requests) < 2:
            await asyncio.sleep(0.001)
        s.engine.may_step.clear()
        assert await asyncio.to_thread(s.engine.hangs.wait, TIMEOUT_S)
        passed_s.append(0.4)
        assert (await refused(stream)).code() == grpc.StatusCode.UNAVAILABLE
        answer = await asking
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
        assert (await anext(statuses)).status == Health.NOT_SERVING
        assert set((await health(s.target)).values()) == {Health.NOT_SERVING}
        assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [503, 503]
        s.engine.may_step.set()  # so that its thread can end


async def test_serve_raises_what_construction_raised():
    def build():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        await serve(build, ServerOptions(port=0), stop=asyncio.Event())


async def test_a_port_in_use_is_one_clear_error_before_anything_is_loaded(taken_port):
    built = []
    for options in (ServerOptions(port=taken_port), ServerOptions(port=0, metrics_port=taken_port)):
        with pytest.raises(ServeError, match=f"^cannot listen on 127.0.0.1:{taken_port}: it is in use$"):
            await Server(lambda: built.append(1) or FakeEngine(), options).start()
    assert built == []


async def test_two_servers_on_one_port_and_on_two():
    async with serving() as first:
        with pytest.raises(ServeError, match="in use"):
            await Server(FakeEngine, ServerOptions(port=first.server.port)).start()
        async with serving() as second:
            assert first.server.port != second.server.port
            texts = await asyncio.gather(
                text_of(first.client.generate("a", max_tokens=50)), text_of(second.client.generate("b", max_tokens=50))
            )
            assert texts == [expected_text("a", 50), expected_text("b", 50)]


async def test_an_unknown_host_is_one_clear_error():
    with pytest.raises(ServeError, match=r"^cannot listen on 203\.0\.113\.1:0: "):
        await Server(FakeEngine, ServerOptions(port=0, host="203.0.113.1")).start()


async def scrape(port: int | None) -> dict[str, float]:
    def read():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
            return answer.read().decode()

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    return {
        sample.name + "".join(f"/{v}" for k, v in sample.labels.items() if k != "le"): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("le", "+Inf") == "+Inf"
    }


async def test_metrics():
    async with serving(endless_engine(), metrics_port=0) as s:
        await text_of(s.client.generate("abc", max_tokens=5))
        await text_of(s.client.generate("abc", stop_token_ids=list(range(256))))
        stream = s.client.generate("a", request_id="x")
        first = await anext(stream)
        await s.client.abort("x")
        num_aborted = len(first.token_ids) + sum([len(chunk.token_ids) async for chunk in stream])
        metrics = await scrape(s.server.metrics_port)
        reasons = {r: metrics[f"jaxserve:request_success_total/{r}"] for r in ("stop", "length", "abort", "deadline")}
        assert reasons == {"stop": 1, "length": 1, "abort": 1, "deadline": 0}
        expected = {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "kv_page_fragmentation_perc": 0.5,
            "prefix_cache_queries_total": 40,
            "prefix_cache_hits_total": 30,
            "num_preemptions_total": 2,
            "prompt_tokens_total": 7,
            "generation_tokens_total": 6 + num_aborted,
            "recompilations_after_ready_total": 0,
            "time_to_first_token_seconds_count": 3,
            "inter_token_latency_seconds_count": 4 + num_aborted - 1,
            "e2e_request_latency_seconds_count": 2,
            "request_prompt_tokens_sum": 6,
            "request_generation_tokens_sum": 6,
            "request_params_n_count": 3,
            "request_params_n_sum": 3,
            "request_params_max_tokens_count": 1,
            "request_params_max_tokens_sum": 5,
            "iteration_tokens_total_sum": 6 + num_aborted,
            "iteration_tokens_total_count": s.engine.num_steps,
            "request_queue_time_seconds_sum": 2 * QUEUE_TIME_S,
            "request_queue_time_seconds_count": 2,
            "request_inference_time_seconds_count": 2,
            "request_prefill_time_seconds_count": 2,
            "request_decode_time_seconds_count": 2,
            "request_time_per_output_token_seconds_count": 1,  # the other has one token
            "cache_config_info/auto/float32/1000000/8/100/16/True": 1,
        }
        assert {name: metrics[f"jaxserve:{name}"] for name in expected} == pytest.approx(expected)
        phases = {
            name: metrics[f"jaxserve:{name}_seconds_sum"]
            for name in ("e2e_request_latency", "request_inference_time", "request_prefill_time", "request_decode_time")
        }
        e2e, inference, prefill, decode = phases.values()
        assert inference == pytest.approx(e2e - 2 * QUEUE_TIME_S) == pytest.approx(prefill + decode)
        assert 0 < decode < e2e
        assert 0 < metrics["jaxserve:time_to_first_token_seconds_sum"] < TIMEOUT_S


async def test_metrics_before_ready_have_no_engine_figures():
    may_build = threading.Event()
    async with serving(may_build=may_build, wait_ready=False, metrics_port=0) as s:
        metrics = await scrape(s.server.metrics_port)
        assert "jaxserve:num_requests_running" not in metrics
        assert metrics["jaxserve:request_success_total/stop"] == 0
