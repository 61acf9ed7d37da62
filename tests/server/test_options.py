"""What ``ServerOptions`` refuses, and that a refused server loads nothing."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from jaxserve.server import app
from jaxserve.server.app import ServeError, Server
from jaxserve.server.options import DEFAULT_TARGET, ServerOptions
from tests.server.fake_engine import FakeEngine

REFUSED: list[tuple[str, Any]] = [
    ("host", ""),
    ("port", -1),
    ("port", 70000),
    ("metrics_port", -1),
    ("metrics_port", 99999),
    ("metrics_port", 50051),
    ("drain_timeout_s", -1.0),
    ("drain_timeout_s", math.inf),
    ("drain_timeout_s", math.nan),
    ("step_timeout_s", -1.0),
    ("step_timeout_s", math.inf),
    ("slow_reader_timeout_s", 0.0),
    ("slow_reader_timeout_s", -1.0),
    ("slow_reader_timeout_s", math.inf),
    ("slow_reader_timeout_s", math.nan),
    ("http_port", -1),
    ("http_port", 50051),
    ("body_timeout_s", 0.0),
    ("request_timeout_s", 0.0),
    ("request_timeout_s", math.inf),
    ("max_concurrent_requests", 0),
    ("max_output_tokens", 0),
    ("tool_call_parser", "xml"),
    ("max_prompt_bytes", 0),
    ("max_message_bytes", 0),
    ("max_message_bytes", 2**31),
    ("otlp_traces_endpoint", "127.0.0.1:4317"),
    ("otlp_traces_endpoint", "ftp://127.0.0.1:4317"),
    ("otlp_traces_endpoint", "http://:4317"),
    ("otlp_traces_endpoint", "http://127.0.0.1"),
    ("otlp_traces_endpoint", "http://127.0.0.1:0"),
    ("otlp_traces_endpoint", "http://127.0.0.1:65536"),
    ("otlp_traces_endpoint", "http://127.0.0.1:many"),
    ("otlp_traces_endpoint", "http://127.0.0.1:4318/v1/traces"),
    ("otlp_traces_endpoint", "http://[::1"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_out_of_range_names_the_field_and_the_value(field, value):
    shown = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else value
    with pytest.raises(ValueError, match=f"^{re.escape(f'{field}={shown}')} "):
        ServerOptions(**dict[str, Any]({field: value}))


def test_the_ends_of_the_ranges_are_taken():
    ServerOptions(port=0, metrics_port=0, drain_timeout_s=0, max_prompt_bytes=1, max_message_bytes=1)
    ServerOptions(port=65535, metrics_port=None, slow_reader_timeout_s=1e-3, max_message_bytes=2**31 - 1)
    for url in ("http://collector:4317", "grpc://127.0.0.1:65535/", "https://[::1]:1"):
        ServerOptions(otlp_traces_endpoint=url)
    assert f"{ServerOptions().host}:{ServerOptions().port}" == DEFAULT_TARGET


CONTRADICTIONS: list[dict[str, Any]] = [
    {"http_port": 8000, "metrics_port": 8000},
    {"tls_cert": Path("a")},
    {"tls_key": Path("a")},
    {"tls_client_ca": Path("a")},
    {"metrics_port": 1, "api_keys_file": Path("a")},
    {"served_model_names": ("a", "")},
]


@pytest.mark.parametrize("options", CONTRADICTIONS)
def test_contradictions_name_their_fields(options: dict[str, Any]):
    with pytest.raises(ValueError) as caught:
        ServerOptions(**options)
    assert all(f"{name}=" in str(caught.value) or name == "http_port" for name in options)


async def test_a_metrics_port_lost_at_the_last_moment_is_one_error_before_anything_is_loaded(taken_port, monkeypatch):
    monkeypatch.setattr(app, "check_can_bind", lambda host, port: None)  # as if it was taken after the check
    built = []
    with pytest.raises(ServeError, match=f"^cannot bind 127.0.0.1:{taken_port}: "):
        await Server(lambda: built.append(1) or FakeEngine(), ServerOptions(port=0, metrics_port=taken_port)).start()
    assert built == []
