"""Adapters over HTTP, under vLLM's paths: requests name one as their ``model``, beside the base model."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from jaxserve.server.http.backend import Backend
from jaxserve.server.http.routes import Routes
from jaxserve.server.loras import load_lora


class LoadLoraRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_path: str


class UnloadLoraRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str


def lora_routes(backend: Backend) -> APIRouter:
    router = Routes(tags=["Adapters"])

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadLoraRequest) -> dict[str, Any]:
        """Loads the LoRA adapter in a folder of the server's machine, one of those that it may read from. Requests may
        name it as their model from the answer on."""
        adapter = await load_lora(backend.async_engine, backend.options, body.lora_name, body.lora_path)
        return {"lora_name": adapter.name, "lora_path": adapter.path, "rank": adapter.rank}

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLoraRequest) -> dict[str, Any]:
        """No request may name the adapter any more; those that run with it go on."""
        await backend.async_engine.unload_lora(body.lora_name)
        return {"lora_name": body.lora_name}

    return router
