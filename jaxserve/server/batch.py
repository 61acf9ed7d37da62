"""``GenerateBatch``: many requests on one call, coming and going in any order, their chunks in one stream."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import grpc

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.request import FinishReason
from jaxserve.server.codec import Asked, ChunkWriter
from jaxserve.server.v1 import inference_pb2 as pb

Read = Callable[[pb.GenerateRequest], Awaitable[Asked]]
Write = Callable[[pb.BatchChunk], Awaitable[None]]
Failed = Callable[[str, Exception], pb.BatchChunk | None]  # None: the whole call ends by the exception


class MissingIdError(Exception):
    """A request of a batch that names no id: nobody could tell whose its chunks are."""


async def run_batch(
    messages: AsyncIterator[pb.GenerateRequest], engine: AsyncEngine, read: Read, write: Write, failed: Failed
) -> set[FinishReason]:
    """Runs every request of ``messages`` until they and their chunks have ended; returns how any of them ended.

    A request that fails has a chunk that says so, and the others go on; whatever ends the call ends them all.

    Args:
        read: what a message asks for.
        write: hands a chunk to the transport; called by one task at a time.
        failed: the chunk that tells what became of a request.
    """
    writing = asyncio.Lock()
    ends: set[FinishReason] = set()

    async def say(chunk: pb.BatchChunk) -> None:
        async with writing:
            await write(chunk)

    async def run(message: pb.GenerateRequest) -> None:
        try:
            asked = await read(message)
            writer = ChunkWriter(asked.tools)
            async with aclosing(engine.stream_batches(asked.request)) as batches:
                async for events in batches:
                    ends.update(e.finish_reason for e in events if e.finish_reason is not None)
                    for chunk in writer.chunks(events):
                        await say(pb.BatchChunk(chunk=chunk))
        except Exception as error:
            if (chunk := failed(message.request_id, error)) is None:
                raise
            await say(chunk)

    try:
        async with asyncio.TaskGroup() as tasks:
            async for message in messages:
                if not message.HasField("request_id"):
                    raise MissingIdError("request_id: every request of a batch needs one")
                tasks.create_task(run(message))
    except* grpc.RpcError:
        raise asyncio.CancelledError from None
    except* Exception as group:
        raise _first(group) from None
    return ends


def _first(group: BaseExceptionGroup) -> BaseException:
    """One error stands for all: the call has one status."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
