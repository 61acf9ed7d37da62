"""What every gRPC call goes through before a service has it."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]

_COUNTS = {False: "unary", True: "stream"}
_MALFORMED = object()  # in place of a message


def same_form(handler: Any, behaviour: Callable[..., Any], deserialize: Callable[[bytes], Any] | None = None) -> Any:
    """``behaviour`` as a handler whose requests and responses are one or a stream as those of ``handler`` are."""
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(behaviour, deserialize or handler.request_deserializer, handler.response_serializer)


def _behaviour(handler: Any) -> Any:
    """The method itself."""
    return getattr(handler, f"{_COUNTS[handler.request_streaming]}_{_COUNTS[handler.response_streaming]}")


class LostCallInterceptor(grpc.aio.ServerInterceptor):
    """CancelledError, which gRPC takes for a client that went, in place of its own InternalError, by which a chunk, a
    status or metadata cannot be sent any more: gRPC may be told only later that the client went, and until then raises
    its error into nowhere, as a task's, which is logged as the server's."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:  # a handler, or None
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        behaviour = _behaviour(handler)

        async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await behaviour(request, context)
            except grpc.aio.InternalError as error:
                raise asyncio.CancelledError from error

        async def generate(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.InternalError as error:
                raise asyncio.CancelledError from error

        return same_form(handler, generate if inspect.isasyncgenfunction(behaviour) else handle)


class MalformedInterceptor(grpc.aio.ServerInterceptor):
    """INVALID_ARGUMENT for bytes that are no message: gRPC itself says UNKNOWN, and logs a traceback for each."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:  # a handler, or None
        handler: Any = await continuation(handler_call_details)  # None: no such method
        if handler is None:
            return None
        behaviour = _behaviour(handler)
        is_generator = inspect.isasyncgenfunction(behaviour)
        # What generated code has in place of a method that its service lacks (List of health) logs a traceback, too.
        if not (is_generator or inspect.iscoroutinefunction(behaviour)):
            return None

        def deserialize(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return _MALFORMED

        async def check(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if request is _MALFORMED:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request's bytes are no message of its type")
            return request

        async def checked(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for request in requests:
                yield await check(request, context)

        async def given(request: Any, context: grpc.aio.ServicerContext) -> Any:
            return checked(request, context) if handler.request_streaming else await check(request, context)

        async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
            return await behaviour(await given(request, context), context)

        async def generate(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with aclosing(behaviour(await given(request, context), context)) as responses:
                async for response in responses:
                    yield response

        # Our methods are coroutines, which write what they stream; that of reflection is a generator.
        return same_form(handler, generate if is_generator else handle, deserialize)
