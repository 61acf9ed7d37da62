"""What a server may be told at its start."""

import math
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051
DEFAULT_TARGET = f"{DEFAULT_HOST}:{DEFAULT_PORT}"  # where a client looks for a server that was told nothing


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits and addresses of one server. Raises ValueError with the field and the value that is out of range.

    Attributes:
        host: address to bind, of the metrics endpoint too. Not loopback means open to whoever reaches it: no TLS here.
        port: gRPC port; 0 picks a free one.
        metrics_port: Prometheus port; 0 picks a free one, None serves no metrics.
        weight_folders: what UpdateWeights may read from; none: it is refused.
        drain_timeout_s: how long running requests may go on after the first SIGTERM or SIGINT.
        slow_reader_timeout_s: a stream whose client takes nothing for this long while output is pending is aborted.
        max_prompt_bytes: a text prompt (all messages of a chat together) of more UTF-8 bytes is refused; None: any is
            taken that could fit in ``max_model_len`` of the longest tokens. Both are told before tokenizing.
        max_message_bytes: gRPC messages of more bytes are refused before they are parsed.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    metrics_port: int | None = None
    drain_timeout_s: float = 30.0
    weight_folders: tuple[Path, ...] = ()
    slow_reader_timeout_s: float = 30.0
    max_prompt_bytes: int | None = None
    max_message_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError(f"host={self.host!r} is empty")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name}={port} is not in 0..65535")
        if self.metrics_port == self.port != 0:
            raise ValueError(f"metrics_port={self.metrics_port} is the gRPC port too")
        if not (math.isfinite(self.drain_timeout_s) and self.drain_timeout_s >= 0):
            raise ValueError(f"drain_timeout_s={self.drain_timeout_s:g} is not a finite number >= 0")
        if not (math.isfinite(self.slow_reader_timeout_s) and self.slow_reader_timeout_s > 0):
            raise ValueError(f"slow_reader_timeout_s={self.slow_reader_timeout_s:g} is not a finite number > 0")
        if self.max_prompt_bytes is not None and self.max_prompt_bytes < 1:
            raise ValueError(f"max_prompt_bytes={self.max_prompt_bytes} is less than 1")
        if not 1 <= self.max_message_bytes < 2**31:
            raise ValueError(f"max_message_bytes={self.max_message_bytes} is not in 1..{2**31 - 1}")
