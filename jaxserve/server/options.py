"""What a server may be told at its start."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits and addresses of one server.

    Attributes:
        host: address to bind, of the metrics endpoint too. Not loopback means open to whoever reaches it: no TLS here.
        port: gRPC port; 0 picks a free one.
        metrics_port: Prometheus port; 0 picks a free one, None serves no metrics.
        drain_timeout_s: how long running requests may go on after the first SIGTERM or SIGINT.
        slow_reader_timeout_s: a stream whose client takes nothing for this long while output is pending is aborted.
        max_prompt_bytes: a text prompt (all messages of a chat together) of more UTF-8 bytes is refused; None: any is
            taken that could fit in ``max_model_len`` of the longest tokens. Both are told before tokenizing.
        max_message_bytes: gRPC messages of more bytes are refused before they are parsed.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = None
    drain_timeout_s: float = 30.0
    slow_reader_timeout_s: float = 30.0
    max_prompt_bytes: int | None = None
    max_message_bytes: int = 32 * 2**20
