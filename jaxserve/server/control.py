"""The Control service: what an operator or a trainer asks of a server, beside its users' requests."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import grpc
import grpc.aio

from jaxserve.engine.async_engine import AsyncEngine, NotServingError
from jaxserve.errors import RequestError, UnknownLoraError
from jaxserve.server import codec
from jaxserve.server.loras import NotAllowedError, check_path, load_lora
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
        try:
            check_path("path", path, self._options.weight_folders, "weights")
            async with self._updating:  # two sets of weights beside the served one may not fit
                await self._engine.update_weights(path)
        except (NotServingError, NotAllowedError) as error:
            await _abort(context, error)
        except (ValueError, OSError) as error:  # a file that cannot be used; the served weights stay
            await _refuse(context, "path", str(error))
        return pb.UpdateWeightsResponse()

    async def LoadLora(self, request: pb.LoadLoraRequest, context: grpc.aio.ServicerContext) -> pb.Lora:
        try:
            adapter = await load_lora(self._engine, self._options, request.lora_name, request.lora_path)
        except (NotServingError, RequestError) as error:
            await _abort(context, error)
        return codec.lora_message(adapter)

    async def UnloadLora(
        self, request: pb.UnloadLoraRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadLoraResponse:
        try:
            await self._engine.unload_lora(request.lora_name)
        except (NotServingError, RequestError) as error:
            await _abort(context, error)
        return pb.UnloadLoraResponse()

    async def ListLoras(self, request: pb.ListLorasRequest, context: grpc.aio.ServicerContext) -> pb.ListLorasResponse:
        try:
            adapters = self._engine.engine.list_loras()
        except NotServingError as error:
            await _abort(context, error)
        return pb.ListLorasResponse(loras=[codec.lora_message(adapter) for adapter in adapters])


STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (NotServingError, grpc.StatusCode.UNAVAILABLE),
    (NotAllowedError, grpc.StatusCode.PERMISSION_DENIED),
    (UnknownLoraError, grpc.StatusCode.NOT_FOUND),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
)  # the first that matches


async def _abort(context: grpc.aio.ServicerContext, error: NotServingError | RequestError) -> NoReturn:
    code = next(code for kind, code in STATUS if isinstance(error, kind))
    metadata = ((FIELD_KEY, error.field),) if isinstance(error, RequestError) else ()
    await context.abort(code, str(error), metadata)


async def _refuse(context: grpc.aio.ServicerContext, field: str, message: str) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {message}", ((FIELD_KEY, field),))
