"""The face of an engine that front ends see. Names nothing of JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxserve.config import CacheConfig, LoraConfig, ModelConfig, ParallelConfig, SchedulerConfig
from jaxserve.request import EngineStats, LoadedAdapter, PageMap, Pooling, Request, TokenEvent
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.tokenizer import Tokenizer


class EngineCore(Protocol):
    """What a front end needs of ``engine.Engine``; its tests put a hand-computable engine here."""

    model_name: str
    model_config: ModelConfig
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    parallel_config: ParallelConfig
    dtype: str
    sampling_defaults: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def make_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request: ...
    def make_embedding_request(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def has_unfinished(self) -> bool: ...
    def load_params(self, name_or_path: str | Path) -> Any: ...
    def update_params(self, params: Any) -> None: ...
    @property
    def lora_config(self) -> LoraConfig | None: ...
    def read_lora(self, path: str | Path) -> Any: ...
    def add_lora(self, name: str, adapter: Any) -> LoadedAdapter: ...
    def unload_lora(self, name: str) -> None: ...
    def list_loras(self) -> tuple[LoadedAdapter, ...]: ...
    def stats(self) -> EngineStats: ...
    def page_map(self) -> PageMap: ...
    def close(self) -> None: ...
