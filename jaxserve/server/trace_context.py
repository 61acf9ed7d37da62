"""Whose span a request belongs to, and whether spans can be made at all. Imports nothing of OpenTelemetry."""

from collections.abc import Callable
from importlib import metadata
from urllib.parse import urlsplit

HEADERS = ("traceparent", "tracestate")  # of W3C trace context: gRPC metadata and HTTP headers
EXTRA = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc")  # what the extra ``otel`` installs
SCHEMES = ("http", "https", "grpc")  # TLS with the second only

TraceContext = tuple[tuple[str, str], ...]


def trace_context(endpoint: str | None, header: Callable[[str], str | bytes | None]) -> TraceContext:
    """The headers that name the caller's span, as they came; nothing where no spans are made (no ``endpoint``).

    Args:
        header: a header's value by its name in lower case.
    """
    if endpoint is None:
        return ()
    found = ((name, header(name)) for name in HEADERS)
    return tuple((name, value) for name, value in found if isinstance(value, str) and value)


def check_endpoint(url: str) -> None:
    """Raises ValueError for what is not the address of a collector that speaks OTLP over gRPC."""
    told = f"otlp_traces_endpoint={url!r}"
    try:
        parts = urlsplit(url)
        has_port = bool(parts.port)
    except ValueError as error:  # brackets, or a port that is no number or too large a one
        raise ValueError(f"{told} is not a URL: {error}") from None
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError(f"{told} is not http://HOST:PORT (or grpc://, the same) or, for TLS, https://HOST:PORT")
    if not has_port:
        raise ValueError(f"{told} has no port (collectors take OTLP over gRPC at 4317)")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"{told} has a path: OTLP over gRPC has none (over HTTP, which is not spoken here, it has)")


def check_extra() -> None:
    """Raises ValueError unless what makes and exports spans is installed."""
    missing = [name for name in EXTRA if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"otlp_traces_endpoint needs {' and '.join(missing)}, not installed here: pip install 'jaxserve[otel]'"
        )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
