"""``jaxserve bench server``: what a server adds to its engine for one client, and what its messages cost."""

import http.client
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import grpc
import grpc.experimental

from jaxserve.bench.environment import command_line
from jaxserve.loadtest.process import Served, cpu_seconds, server_process
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.channels import CHANNEL_OPTIONS
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc

Way = Literal["engine", "grpc", "http"]
STREAM_INTERVALS = (1, 5)
NUM_WARM_UP = 3

Row = dict[str, Any]
LATENCY_FIGURES = (
    ("way", "way"),
    ("TTFT ms", "ttft_ms"),
    ("TTFT added", "added_ttft_ms"),
    ("ms a token", "tpot_ms"),
    ("ms a token added", "added_tpot_ms"),
)
MESSAGE_FIGURES = (
    ("way", "way"),
    ("stream_interval", "stream_interval"),
    ("messages / 1000 tokens", "messages_per_1000_tokens"),
    ("bytes", "bytes_per_1000_tokens"),
    ("server CPU s", "server_cpu_s_per_1000_tokens"),
    ("client CPU s", "client_cpu_s_per_1000_tokens"),
)


class Piece(NamedTuple):
    at_s: float
    num_tokens: int
    num_bytes: int  # on the wire, without gRPC's and TCP's own headers


class GrpcReader:
    # What a client library adds is not the server's: the usual stream starts a thread, which hands every answer over.
    # Not for ``Client``: one of this kind that is cancelled leaves 16 KiB (grpc 1.85).
    _OPTIONS = (*CHANNEL_OPTIONS, (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1))

    def __init__(self, served: Served):
        self._channel = grpc.insecure_channel(served.target, options=self._OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def read(self, prompt: list[int], num_tokens: int, stream_interval: int) -> Iterator[Piece]:
        sampling = pb.SamplingParams(
            max_tokens=num_tokens, ignore_eos=True, temperature=0, stream_interval=stream_interval
        )
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        for chunk in self._stub.Generate(request):
            yield Piece(time.perf_counter(), len(chunk.token_ids), chunk.ByteSize())

    def close(self) -> None:
        self._channel.close()


class HttpReader:
    """Reads with the standard library's client: what a client library adds is not the server's."""

    def __init__(self, served: Served):
        where = urlsplit(served.url)
        assert where.hostname is not None
        self._connection = http.client.HTTPConnection(where.hostname, where.port)

    def read(self, prompt: list[int], num_tokens: int, stream_interval: int) -> Iterator[Piece]:
        body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        body |= {"stream_interval": stream_interval}
        self._connection.request("POST", "/generate/stream", json.dumps(body), {"content-type": "application/json"})
        answer = self._connection.getresponse()
        if answer.status != http.client.OK:
            raise RuntimeError(f"HTTP {answer.status}: {answer.read().decode()}")
        while line := answer.readline():
            at_s = time.perf_counter()
            if line.startswith(b"data: {"):
                yield Piece(at_s, len(json.loads(line[6:])["token_ids"]), len(line) + 1)

    def close(self) -> None:
        self._connection.close()


def run(
    model: str,
    *,
    prompt_len: int = 32,
    num_output_tokens: int = 64,
    repeats: int = 20,
    num_streamed_tokens: int = 4000,
    platform: str | None = None,
    output: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
    **options: Any,
) -> list[Row]:
    """First the latencies: a row for each way, ``engine`` (in this process) before ``grpc`` and ``http`` (over loopback
    from a process of the server's own), one request at a time, the ways taking turns. Then the messages: a row for gRPC
    and HTTP at each of ``STREAM_INTERVALS``. HTTP is ``/generate/stream``.

    Two engines are there at once, so that both are measured under the same load of the machine: for CPUs.

    Args:
        repeats: requests of each way.
        num_streamed_tokens: of each row of messages.
        options: keywords of ``Engine.from_pretrained``.

    Raises:
        ValueError: a number below 1.
        RuntimeError: the server cannot be started.
    """
    numbers = {"prompt_len": prompt_len, "num_output_tokens": num_output_tokens, "repeats": repeats}
    for name, value in (numbers | {"num_streamed_tokens": num_streamed_tokens}).items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    from jaxserve.engine.engine import Engine

    options["prefix_caching"] = False  # so that every prompt is computed
    command = command_line("server", model, numbers | options)
    rows: list[Row] = []

    def add(row: Row, about: Row) -> None:
        rows.append(about | {"command": command, "load_average": round(os.getloadavg()[0], 2)} | row)
        if output is not None:
            output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if on_row is not None:
            on_row(rows[-1])

    with (
        Engine.from_pretrained(model, **options) as engine,
        server_process(model, options, platform) as served,
        closing(GrpcReader(served)) as over_grpc,
        closing(HttpReader(served)) as over_http,
    ):
        r = random.Random(0)
        vocab_size = engine.model_config.vocab_size

        def prompt() -> list[int]:
            return [r.randrange(vocab_size) for _ in range(prompt_len)]

        def in_process(prompt: list[int], num_tokens: int, stream_interval: int) -> Iterator[Piece]:
            params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0)
            for event in engine.stream(prompt, params):
                yield Piece(time.perf_counter(), int(event.token_id is not None), 0)

        ways: dict[Way, Callable[[list[int], int, int], Iterator[Piece]]] = {
            "engine": in_process,
            "grpc": over_grpc.read,
            "http": over_http.read,
        }
        times: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}  # TTFT and TPOT, ms
        for i in range(NUM_WARM_UP + repeats):
            for way, read in ways.items():
                started = time.perf_counter()
                pieces = list(read(prompt(), num_output_tokens, 1))
                first, last = pieces[0].at_s, pieces[-1].at_s
                if i >= NUM_WARM_UP:
                    per_token = (last - first) / max(num_output_tokens - 1, 1)
                    times[way].append(((first - started) * 1000, per_token * 1000))
        about = served.about | numbers | {"model": engine.model_name}
        base = [statistics.median(values) for values in zip(*times["engine"], strict=True)]
        for way, values in times.items():
            ttft, tpot = (statistics.median(column) for column in zip(*values, strict=True))
            row: Row = {"measured": "latency", "way": way, "ttft_ms": round(ttft, 3), "tpot_ms": round(tpot, 4)}
            if way != "engine":
                row |= {"added_ttft_ms": round(ttft - base[0], 3), "added_tpot_ms": round(tpot - base[1], 4)}
            add(row, about)
        for way in ("grpc", "http"):
            for interval in STREAM_INTERVALS:
                add(_messages(served, way, ways[way], prompt, num_output_tokens, interval, num_streamed_tokens), about)
    return rows


def _messages(
    served: Served,
    way: Way,
    read: Callable[[list[int], int, int], Iterator[Piece]],
    prompt: Callable[[], list[int]],
    num_output_tokens: int,
    interval: int,
    num_tokens: int,
) -> Row:
    num_messages = num_bytes = done = 0
    server_before, client_before, started = cpu_seconds(served.pid), time.process_time(), time.perf_counter()
    while done < num_tokens:
        for piece in read(prompt(), num_output_tokens, interval):
            num_messages += 1
            num_bytes += piece.num_bytes
            done += piece.num_tokens
    client_cpu, seconds = time.process_time() - client_before, time.perf_counter() - started
    server_after = cpu_seconds(served.pid)
    thousands = done / 1000
    row: Row = {
        "measured": "messages",
        "way": way,
        "stream_interval": interval,
        "messages_per_1000_tokens": round(num_messages / thousands, 1),
        "bytes_per_1000_tokens": round(num_bytes / thousands),
        "seconds_per_1000_tokens": round(seconds / thousands, 3),
        "client_cpu_s_per_1000_tokens": round(client_cpu / thousands, 4),
        "server_cpu_s_per_1000_tokens": None,
    }
    if server_before is not None and server_after is not None:
        row["server_cpu_s_per_1000_tokens"] = round((server_after - server_before) / thousands, 4)
    return row
