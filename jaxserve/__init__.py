"""jaxserve: an inference engine for large language models on JAX.

The names below are loaded on first use, so that the host wing (configs, scheduler, text) never imports jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import ModelConfig
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.options import EngineOptions
    from jaxserve.errors import RequestError
    from jaxserve.request import Completion, Embedding, TokenEvent
    from jaxserve.sampling_params import SamplingParams, StructuredOutputs
    from jaxserve.server.client import AsyncClient, Client

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "jaxserve.server.client",
    "AsyncEngine": "jaxserve.engine.async_engine",
    "Client": "jaxserve.server.client",
    "Completion": "jaxserve.request",
    "Embedding": "jaxserve.request",
    "Engine": "jaxserve.engine.engine",
    "EngineOptions": "jaxserve.engine.options",
    "ModelConfig": "jaxserve.config",
    "RequestError": "jaxserve.errors",
    "SamplingParams": "jaxserve.sampling_params",
    "StructuredOutputs": "jaxserve.sampling_params",
    "TokenEvent": "jaxserve.request",
}
__all__ = [
    "AsyncClient",
    "AsyncEngine",
    "Client",
    "Completion",
    "Embedding",
    "Engine",
    "EngineOptions",
    "ModelConfig",
    "RequestError",
    "SamplingParams",
    "StructuredOutputs",
    "TokenEvent",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
