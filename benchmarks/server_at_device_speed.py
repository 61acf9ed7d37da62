"""What gRPC costs an engine whose device is fast, without one: steps take a given time, and their tokens are random.

    python -m benchmarks.server_at_device_speed [--rows 256] [--step-ms 19] [--seconds 10] [--rounds 3] [--out FILE]

By turns the engine alone, in a process that adds a request for each that ends, and the server, whose clients (of
another process, over loopback) do the same. A step of 19 ms with 256 rows is what Llama-3.1-8B has on an H100.
Scheduler, step inputs, detokenizer and server are the real ones; the device is a clock.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import jax
import numpy as np

from benchmarks.host_turn import random_outputs
from jaxserve import Engine, SamplingParams
from jaxserve.bench.environment import environment
from jaxserve.checkpoint.resolve import DEFAULT_MODEL
from jaxserve.engine.loading import opened_model
from jaxserve.model.params import init_params
from jaxserve.server.app import serve
from jaxserve.server.options import ServerOptions
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.step_io import Bucket, StepOutputs

PROMPT, NUM_TOKENS, WARM_UP_S, NUM_CHANNELS = [5] * 16, 256, 4.0, 8


class Handle(NamedTuple):
    num_rows: int
    ready_at: float  # perf_counter


class Clock:
    """A runner whose device takes ``step_s`` for each step, one after another; all else is ``runner``'s."""

    def __init__(self, runner: Any, step_s: float):
        self._runner, self._step_s = runner, step_s
        self._free_at = 0.0
        self._random = np.random.default_rng(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, bucket: Bucket, buffers: np.ndarray, *, has_adapters: bool) -> Handle:
        self._free_at = max(time.perf_counter(), self._free_at) + self._step_s
        return Handle(bucket.num_rows, self._free_at)

    def sample(self, computed: Handle, asked: str, allowed: None) -> Handle:
        return computed

    def read(self, handle: Handle) -> StepOutputs:
        time.sleep(max(0.0, handle.ready_at - time.perf_counter()))
        return random_outputs(self._random, handle.num_rows)


def make_engine(num_rows: int, step_s: float) -> Engine:
    """With the packaged model's tokenizer, and one layer that is never run after the warm-up."""
    with opened_model(DEFAULT_MODEL) as model:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64}
        config, tokenizer = replace(model.config, num_layers=1, **sizes), model.tokenizer
    max_model_len = len(PROMPT) + NUM_TOKENS
    engine = Engine.from_params(
        config,
        init_params(config, jax.random.key(0)),
        tokenizer,
        max_num_seqs=num_rows,
        decode_sizes=(num_rows,),
        prefill_sizes=(4 * num_rows,),
        max_model_len=max_model_len,
        num_pages=num_rows * -(-max_model_len // 16),
        samplings=("greedy",),
    )
    runner: Any = Clock(engine.loop.runner, step_s)
    engine.loop.runner = runner
    return engine


def alone(num_rows: int, step_s: float, seconds: float) -> dict[str, float]:
    """The engine in this process."""
    engine = make_engine(num_rows, step_s)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for _ in range(num_rows):
        engine.add_request(engine.make_request(PROMPT, params))
    begin, num_tokens, cpu_s = time.perf_counter() + WARM_UP_S, 0, 0.0
    while (now := time.perf_counter()) < begin + seconds:
        if now >= begin and not cpu_s:
            num_tokens, cpu_s = 0, time.process_time()
        for event in engine.step():
            num_tokens += 1
            if event.ends_request:
                engine.add_request(engine.make_request(PROMPT, params))
    return {"tokens_per_s": num_tokens / seconds, "cpu_us_a_token": 1e6 * (time.process_time() - cpu_s) / num_tokens}


async def behind_grpc(num_rows: int, step_s: float, seconds: float) -> dict[str, float]:
    """The server in a process of its own, whose figures are read over ``GetServerInfo``."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "benchmarks.server_at_device_speed", "--serve", str(port_file)]
        server = subprocess.Popen([*command, f"--rows={num_rows}", f"--step-ms={1e3 * step_s}"])
        try:
            while not port_file.exists():
                assert server.poll() is None
                await asyncio.sleep(0.1)
            return await _read_all(f"127.0.0.1:{port_file.read_text()}", server.pid, num_rows, seconds)
        finally:
            server.kill()
            server.wait()


async def _read_all(target: str, pid: int, num_rows: int, seconds: float) -> dict[str, float]:
    channels = [
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(NUM_CHANNELS)
    ]
    num_messages = 0

    async def read(channel: grpc.aio.Channel) -> None:
        nonlocal num_messages
        generate = channel.unary_stream(  # chunks stay bytes: the clients share the machine
            "/jaxserve.v1.Inference/Generate", request_serializer=pb.GenerateRequest.SerializeToString
        )
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
        request.sampling.temperature, request.sampling.max_tokens, request.sampling.ignore_eos = 0, NUM_TOKENS, True
        while True:
            async for _ in generate(request):
                num_messages += 1

    async def num_tokens() -> int:
        stub = channels[0].unary_unary(
            "/jaxserve.v1.Inference/GetServerInfo",
            request_serializer=pb.GetServerInfoRequest.SerializeToString,
            response_deserializer=pb.ServerInfo.FromString,
        )
        return (await stub(pb.GetServerInfoRequest())).load.generation_tokens

    tasks = [asyncio.create_task(read(channels[i % NUM_CHANNELS])) for i in range(num_rows)]
    await asyncio.sleep(WARM_UP_S)
    begin, tokens, messages, cpu_s = time.perf_counter(), await num_tokens(), num_messages, _cpu_s(pid)
    await asyncio.sleep(seconds)
    took_s, tokens, cpu_s = time.perf_counter() - begin, await num_tokens() - tokens, _cpu_s(pid) - cpu_s
    messages = num_messages - messages
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return {
        "tokens_per_s": tokens / took_s,
        "messages_a_token": messages / tokens,
        "cpu_us_a_token": 1e6 * cpu_s / tokens,
    }


def _cpu_s(pid: int) -> float:
    """Processor seconds of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=19.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    step_s = args.step_ms / 1e3
    if args.serve is not None:
        options = ServerOptions(port=0, max_concurrent_requests=4 * args.rows)
        asyncio.run(
            serve(lambda: make_engine(args.rows, step_s), options, on_ready=lambda s: _tell(args.serve, s.port))
        )
        return
    rounds = []
    for _ in range(args.rounds):
        found = {"alone": alone(args.rows, step_s, args.seconds)}
        found["grpc"] = asyncio.run(behind_grpc(args.rows, step_s, args.seconds))
        rounds.append({way: {name: round(x, 3) for name, x in row.items()} for way, row in found.items()})
        print(rounds[-1], flush=True)
    ratio = statistics.median(r["grpc"]["tokens_per_s"] / r["alone"]["tokens_per_s"] for r in rounds)
    load = round(os.getloadavg()[0], 1)
    print(f"gRPC has {100 * ratio:.1f} % of the tokens (load average {load})")
    if args.out is not None:
        command = "python -m benchmarks.server_at_device_speed " + " ".join(
            f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("rows", "step-ms", "seconds", "rounds")
        )
        about = {"command": command, "load_average": load, "ideal_tokens_per_s": args.rows / step_s}
        args.out.write_text(
            json.dumps(environment() | about | {"ratio": round(ratio, 4), "rounds": rounds}, indent=1) + "\n"
        )


def _tell(path: Path, port: int | None) -> None:
    waiting = path.with_suffix(".new")
    waiting.write_text(str(port))
    waiting.rename(path)


if __name__ == "__main__":
    main()
