"""jaxserve: an inference engine for large language models on JAX.

The names below are loaded on first use, so that the host wing (configs, scheduler, text) never imports jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import ModelConfig
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.engine.engine import Engine
    from jaxserve.request import Completion, RequestError, SamplingParams, TokenEvent

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "jaxserve.engine.async_engine",
    "Completion": "jaxserve.request",
    "Engine": "jaxserve.engine.engine",
    "ModelConfig": "jaxserve.config",
    "RequestError": "jaxserve.request",
    "SamplingParams": "jaxserve.request",
    "TokenEvent": "jaxserve.request",
}
__all__ = ["AsyncEngine", "Completion", "Engine", "ModelConfig", "RequestError", "SamplingParams", "TokenEvent"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
