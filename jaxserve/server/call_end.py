"""How a call of several requests has ended, for the client: gRPC may say something else first."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

import grpc

_STATUS_TIMEOUT_S = 1.0  # it comes with what ended the call, or never


async def own_end(
    call: grpc.aio.Call, error: grpc.aio.AioRpcError, noted: Sequence[grpc.aio.AioRpcError]
) -> grpc.aio.AioRpcError:
    """The status that a call of several requests has ended by. Where one was about to be sent as the call ended, gRPC
    replaces that by a status of its own, which says nothing, or says its own first, and then lets the other one replace
    it.

    Args:
        noted: what the call's end was said to be when it came.
    """
    for end in (error, *noted):
        if not _says_nothing(end):
            return end
    with suppress(TimeoutError):
        async with asyncio.timeout(_STATUS_TIMEOUT_S):
            while _says_nothing(end_of(call)):
                await asyncio.sleep(0.01)
    return end_of(call)


def _says_nothing(end: grpc.aio.AioRpcError) -> bool:
    return end.code() == grpc.StatusCode.INTERNAL and end.details() == "Internal error from Core"


def end_of(call: grpc.aio.Call) -> grpc.aio.AioRpcError:
    """The status of a call that has just ended."""
    return grpc.aio.AioRpcError(
        _known(call.code()),
        _known(call.initial_metadata()),
        _known(call.trailing_metadata()),
        details=_known(call.details()),
    )


def _known[T](awaited: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that has nothing to wait for."""
    try:
        awaited.send(None)
    except StopIteration as end:
        return end.value
    awaited.close()
    raise RuntimeError("the call has not ended")
