"""The Control service: what an operator or a trainer asks of a server, beside its users' requests."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio

from jaxserve.engine.async_engine import AsyncEngine, NotServingError
from jaxserve.server import codec
from jaxserve.server.options import ServerOptions
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc

FIELD_KEY = "jaxserve-field"  # as in ``service``


class ControlService(inference_pb2_grpc.ControlServicer):
    """
    Args:
        drain: the server's own, with a time limit in seconds.
    """

    def __init__(self, engine: AsyncEngine, options: ServerOptions, drain: Callable[[float], Awaitable[bool]]):
        self._engine = engine
        self._options = options
        self._drain = drain
        self._updating = asyncio.Lock()

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.EngineLoad:
        stats = self._engine.stats()
        if stats is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine is {self._engine.state}")
        return codec.load_message(stats)

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        if self._engine.state not in ("ready", "draining"):
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the engine is {self._engine.state}")
        limit_s = request.timeout_s if request.HasField("timeout_s") else self._options.drain_timeout_s
        if not 0 <= limit_s < float("inf"):
            await _refuse(context, "timeout_s", f"{limit_s:g} is not a finite number >= 0")
        return pb.DrainResponse(finished=await self._drain(limit_s))

    async def UpdateWeights(
        self, request: pb.UpdateWeightsRequest, context: grpc.aio.ServicerContext
    ) -> pb.UpdateWeightsResponse:
        path = Path(request.path)
        if not _is_allowed(path, self._options.weight_folders):
            message = f"path: {request.path!r} is in none of the folders that this server takes weights from"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, message, ((FIELD_KEY, "path"),))
        try:
            async with self._updating:  # two sets of weights beside the served one may not fit
                await self._engine.update_weights(path)
        except NotServingError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except (ValueError, OSError) as error:  # a file that cannot be used; the served weights stay
            await _refuse(context, "path", str(error))
        return pb.UpdateWeightsResponse()


def _is_allowed(path: Path, folders: tuple[Path, ...]) -> bool:
    """Whether ``path``, links followed, is one of ``folders`` or in one."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)


async def _refuse(context: grpc.aio.ServicerContext, field: str, message: str) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {message}", ((FIELD_KEY, field),))
