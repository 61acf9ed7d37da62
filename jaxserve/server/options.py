"""What a server may be told at its start."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jaxserve.server.trace_context import check_endpoint

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051
DEFAULT_TARGET = f"{DEFAULT_HOST}:{DEFAULT_PORT}"  # where a client looks for a server that was told nothing

ToolCallParser = Literal["auto", "hermes", "llama3_json", "mistral", "pythonic", "none"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits and addresses of one server. Raises ValueError with the field and the value that is out of range.

    Attributes:
        host: address to bind, of the metrics endpoint too. One that is not loopback should go with TLS and tokens.
        port: gRPC port; 0 picks a free one.
        http_port: HTTP port; 0 picks a free one, None serves no HTTP.
        metrics_port: Prometheus port; 0 picks a free one, None serves no metrics (HTTP has them too).
        weight_folders: what UpdateWeights may read from; none: it is refused.
        lora_folders: what adapters may be loaded from while serving; none: it is refused.
        drain_timeout_s: how long running requests may go on after the first SIGTERM or SIGINT.
        slow_reader_timeout_s: a stream whose client takes nothing for this long while output is pending is aborted.
        body_timeout_s: within which an HTTP request's body must have come.
        max_prompt_bytes: a text prompt (all messages of a chat together) of more UTF-8 bytes is refused; None: any is
            taken that could fit in ``max_model_len`` of the longest tokens. Both are told before tokenizing.
        max_message_bytes: gRPC messages and HTTP bodies of more bytes are refused before they are parsed.
        served_model_names: under which HTTP requests ask for the model; empty: its own.
        tool_call_parser: the style in which the model writes tool calls (``tool_calls.STYLES``); "auto": as its chat
            template shows, "none": its text is read for none.
        tls_cert, tls_key: PEM files of the server's certificate chain and its key, for gRPC, HTTP and metrics.
        tls_client_ca: PEM file; clients must then have a certificate that it has signed.
        api_keys_file: tokens, one a line; every call but for health must then carry one of them.
        max_concurrent_requests: generating requests that are open at once, over gRPC and HTTP, waiting ones included;
            None: as many as the engine's queue takes.
        max_requests_per_client: the same of one client (``clients.client_name``).
        max_output_tokens: a request for more is refused, one that does not say gets so many at most.
        step_timeout_s: a step of the engine that takes longer counts as a failed device: running requests fail, and
            ``app.serve`` raises; 0 is no limit. Loading, compiling and warming up are no steps.
        otlp_traces_endpoint: URL of a collector that gets a span of OpenTelemetry for each request over OTLP gRPC:
            ``http://HOST:PORT``, or for TLS ``https://``; None makes no spans. Needs the extra ``otel``.
        request_timeout_s: a request that takes longer, its time in the queue included, is ended as by its deadline.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    http_port: int | None = None
    metrics_port: int | None = None
    drain_timeout_s: float = 30.0
    weight_folders: tuple[Path, ...] = ()
    lora_folders: tuple[Path, ...] = ()
    slow_reader_timeout_s: float = 30.0
    body_timeout_s: float = 30.0
    max_prompt_bytes: int | None = None
    max_message_bytes: int = 32 * 2**20
    served_model_names: tuple[str, ...] = ()
    tool_call_parser: ToolCallParser = "auto"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    api_keys_file: Path | None = None
    max_concurrent_requests: int | None = None
    max_requests_per_client: int | None = None
    max_output_tokens: int | None = None
    request_timeout_s: float | None = None
    step_timeout_s: float = 300.0
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError(f"host={self.host!r} is empty")
        ports = {"port": self.port, "http_port": self.http_port, "metrics_port": self.metrics_port}
        names: dict[int, str] = {}
        for name, port in ports.items():
            if port is None:
                continue
            if not 0 <= port <= 65535:
                raise ValueError(f"{name}={port} is not in 0..65535")
            if port and port in names:
                other = "the gRPC port" if names[port] == "port" else names[port]
                raise ValueError(f"{name}={port} is {other} too")
            names[port] = name
        for name in ("drain_timeout_s", "step_timeout_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name}={seconds:g} is not a finite number >= 0")
        for name in ("slow_reader_timeout_s", "body_timeout_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name}={seconds:g} is not a finite number > 0")
        if self.max_prompt_bytes is not None and self.max_prompt_bytes < 1:
            raise ValueError(f"max_prompt_bytes={self.max_prompt_bytes} is less than 1")
        if not 1 <= self.max_message_bytes < 2**31:
            raise ValueError(f"max_message_bytes={self.max_message_bytes} is not in 1..{2**31 - 1}")
        for name in ("max_concurrent_requests", "max_requests_per_client", "max_output_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is less than 1")
        limit = self.request_timeout_s
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"request_timeout_s={limit:g} is not a finite number > 0")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(f"tls_cert={self.tls_cert} and tls_key={self.tls_key}: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"tls_client_ca={self.tls_client_ca} needs tls_cert and tls_key")
        if self.metrics_port is not None and self.api_keys_file is not None:
            raise ValueError(
                f"metrics_port={self.metrics_port} asks for no token, api_keys_file={self.api_keys_file} does: scrape "
                "/metrics of the HTTP port"
            )
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
        if any(not name for name in self.served_model_names):
            raise ValueError(f"served_model_names={self.served_model_names!r} has an empty name")
        if self.tool_call_parser not in get_args(ToolCallParser):
            raise ValueError(
                f"tool_call_parser={self.tool_call_parser!r} is not one of {', '.join(get_args(ToolCallParser))}"
            )
