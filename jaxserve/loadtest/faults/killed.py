"""A client whose process is killed while its streams run."""

import asyncio
import random
import sys
from typing import Any

from jaxserve.loadtest.faults.known import Known, Site, WrongAnswerError
from jaxserve.loadtest.faults.over_http import PLAIN, body_of, post
from jaxserve.server.client import AsyncClient

NUM_STREAMS = 4  # of gRPC, and as many of HTTP
FIELDS: dict[str, Any] = {"ignore_eos": True, "max_tokens": 48}


async def killed(site: Site, known: Known, r: random.Random) -> str:
    command = f"from jaxserve.loadtest.faults.killed import main; main({site.grpc_port}, {site.http_port})"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", command), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        if await process.stdout.readline() != b"streaming\n":
            raise WrongAnswerError("the client's process had no token")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    return "killed"


def main(grpc_port: int, http_port: int) -> None:
    """Streams, says so at the first token of each way, and goes on."""
    asyncio.run(_stream(grpc_port, http_port))


async def _stream(grpc_port: int, http_port: int) -> None:
    async with AsyncClient(f"127.0.0.1:{grpc_port}") as client:

        async def over_grpc(i: int) -> None:
            async for _ in client.generate(token_ids=[i + 1] * 4, **FIELDS):
                came[0].set()

        async def over_http(i: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
            known = Known((i + 1,) * 5, FIELDS, (), "")
            writer.write(post(PLAIN, body_of(known)))
            while await reader.readline():
                came[1].set()

        came = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as streams:
            for i in range(NUM_STREAMS):
                streams.create_task(over_grpc(i))
                streams.create_task(over_http(i))
            for event in came:
                await event.wait()
            print("streaming", flush=True)
            await asyncio.Event().wait()
