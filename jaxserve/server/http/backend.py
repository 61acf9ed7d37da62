"""What the routes share: the engine, the server's options, and the checks that every model route makes."""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.core import EngineCore
from jaxserve.server.http.errors import NO_SUCH_MODEL, HTTPError
from jaxserve.server.options import ServerOptions
from jaxserve.server.recent import RecentLatencies


@dataclass(frozen=True)
class Backend:
    async_engine: AsyncEngine
    options: ServerOptions
    registry: CollectorRegistry
    recent: RecentLatencies

    @property
    def engine(self) -> EngineCore:
        """Raises NotServingError before ready."""
        return self.async_engine.engine

    def model_names(self) -> Sequence[str]:
        """Under which the model is asked for; the first is the one that answers tell."""
        return self.options.served_model_names or (self.engine.model_name,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with. HTTPError for what is neither the model served nor a loaded adapter; None is the
        model."""
        names = (*self.model_names(), *(adapter.name for adapter in self.engine.list_loras()))
        if name is not None and name not in names:
            known = ", ".join(names)
            raise HTTPError(NO_SUCH_MODEL, f"model: {name!r:.200} is not served here, {known:.300} is", "model")
        return name or names[0]

    def lora_of(self, model: str | None) -> str | None:
        """The adapter that ``model`` names, loaded or not; None where it names the base model, or nothing."""
        return None if model is None or model in self.model_names() else model
