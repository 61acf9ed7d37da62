"""A client's connection to a server: options, TLS, and what every call says of the client."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from jaxserve.server.clients import CLIENT_HEADER
from jaxserve.server.v1 import inference_pb2_grpc

# gRPC's own retries: at most so often, each time after a random part of a doubling wait, and never after the first
# answer. What the server refused for now (queue full, loading, draining) is retried, nothing else.
RETRY_POLICY = {
    "methodConfig": [
        {
            "name": [{"service": "jaxserve.v1.Inference"}, {"service": "jaxserve.v1.Control"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(RETRY_POLICY)),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # wait_ready is often called before the server has bound its port
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class TLS:
    """PEM files of a connection: who has signed the server's certificate (None: whom this machine trusts), and the
    client's own certificate and key where the server asks for them. OSError where one cannot be read."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        ca, cert, key = (None if path is None else path.read_bytes() for path in (self.ca, self.cert, self.key))
        return grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(target: str, *, api_key: str | None, tls: TLS | None, name: str | None) -> grpc.Channel:
    """A blocking client's; arguments as of ``client.Client``."""
    if tls is None:
        channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
    pairs = _pairs(api_key, name)
    return grpc.intercept_channel(channel, _Metadata(pairs)) if pairs else channel


def open_async_channel(target: str, *, api_key: str | None, tls: TLS | None, name: str | None) -> grpc.aio.Channel:
    """The same on asyncio, for the running event loop."""
    kinds = (
        _AsyncUnaryMetadata,
        _AsyncStreamMetadata,
        _AsyncBatchMetadata,
    )  # a class of two would count as one of them
    interceptors = [kind(pairs) for kind in kinds] if (pairs := _pairs(api_key, name)) else []
    if tls is None:
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS, interceptors=interceptors)
    return grpc.aio.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS, interceptors=interceptors)


def stubs(channel: grpc.Channel | grpc.aio.Channel) -> tuple[Any, Any, Any]:
    """Of ``Inference``, of ``Control``, and ``Watch`` of grpc.health.v1, which the installed stubs have no type of."""
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return inference_pb2_grpc.InferenceStub(channel), inference_pb2_grpc.ControlStub(channel), watch


class _Metadata(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor
):
    """Every call with what the client says of itself."""

    def __init__(self, pairs: Pairs):
        self._pairs = pairs

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_with_metadata(client_call_details, self._pairs), request)

    intercept_unary_stream = intercept_unary_unary

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(_with_metadata(client_call_details, self._pairs), request_iterator)


class _AsyncUnaryMetadata(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, pairs: Pairs):
        self._pairs = pairs

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(client_call_details, self._pairs), request)


class _AsyncStreamMetadata(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, pairs: Pairs):
        self._pairs = pairs

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_metadata(client_call_details, self._pairs), request)


class _AsyncBatchMetadata(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, pairs: Pairs):
        self._pairs = pairs

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(_with_metadata(client_call_details, self._pairs), request_iterator)


def _pairs(api_key: str | None, name: str | None) -> Pairs:
    token = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    return token if name is None else (*token, (CLIENT_HEADER, name))


def _with_metadata(details: Any, pairs: Pairs) -> Any:
    metadata = [*(details.metadata or ()), *pairs]
    is_async = isinstance(details, grpc.aio.ClientCallDetails)
    replaced: Any = details  # both kinds are named tuples, one of a class that is not public
    return replaced._replace(metadata=grpc.aio.Metadata(*metadata) if is_async else metadata)
