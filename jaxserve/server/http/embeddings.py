"""``/v1/embeddings``: prompts as vectors, of a decoder's final hidden states."""

import base64
import secrets
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from jaxserve.errors import RequestError
from jaxserve.request import Pooling
from jaxserve.request import Request as EngineRequest
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.completions import read_prompts, token_ids_of
from jaxserve.server.http.errors import unfinished
from jaxserve.server.http.fields import BOOLEAN, COUNT, NO_OPS, PRIORITY, PROMPT, boolean, integer, optional, required
from jaxserve.server.http.generation import Generation, deadline_of, in_thread
from jaxserve.server.http.guard import until_left
from jaxserve.server.http.routes import Routes

FORMATS = ("float", "base64")


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    input: Any = required(PROMPT)
    encoding_format: str | None = None
    dimensions: Any = optional(COUNT)
    pooling: Pooling | None = None
    normalize: Any = optional(BOOLEAN)
    truncate_prompt_tokens: Any = optional(COUNT)
    add_special_tokens: Any = optional(BOOLEAN)
    priority: Any = optional(PRIORITY)
    user: Any = optional({"type": "string", "description": NO_OPS["user"]})


def embeddings_routes(backend: Backend) -> APIRouter:
    router = Routes(tags=["OpenAI"])

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
        """A vector for each input: of its last token, or with `pooling: "mean"` of all its tokens."""
        model = backend.check_model(body.model)
        deadline = deadline_of(http.headers, backend.options)
        requests = await in_thread({"prompt": "input"}, lambda: _requests(backend, body, deadline))
        generation = Generation(backend, requests, http)
        values = await until_left(http.receive, _embedded(generation))
        shown = [
            {"object": "embedding", "index": i, "embedding": _shown(vector, body.encoding_format)}
            for i, vector in enumerate(values)
        ]
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JSONResponse({"object": "list", "data": shown, "model": model, "usage": usage})

    return router


def _requests(backend: Backend, body: EmbeddingRequest, deadline: float | None) -> list[EngineRequest]:
    """In a thread: tokenizes."""
    engine = backend.engine
    if body.encoding_format not in (None, *FORMATS):
        raise RequestError("encoding_format", f"{body.encoding_format!r:.80} is not one of {', '.join(FORMATS)}")
    width = engine.model_config.hidden_size
    if integer("dimensions", body.dimensions, width, 1, 2**31 - 1) != width:
        raise RequestError("dimensions", f"{body.dimensions}, this model's vectors have {width}")
    priority = integer("priority", body.priority, 0, -(2**31), 2**31 - 1)
    normalize = boolean("normalize", body.normalize, True)
    special = boolean("add_special_tokens", body.add_special_tokens, True)
    cut = body.truncate_prompt_tokens
    name = f"embd-{secrets.token_hex(12)}"
    try:
        prompts = read_prompts(body.input)
    except RequestError as error:
        raise RequestError("input", str(error).removeprefix("prompt: ")) from None
    return [
        engine.make_embedding_request(
            token_ids_of(backend, prompt, special, cut=cut is not None),
            pooling=body.pooling or "last",
            normalize=normalize,
            truncate_prompt_tokens=cut,
            request_id=f"{name}-{i}",
            priority=priority,
            deadline=deadline,
            lora=backend.lora_of(body.model),
        )
        for i, prompt in enumerate(prompts)
    ]


async def _embedded(generation: Generation) -> list[np.ndarray]:
    """The vector of each request."""
    found: dict[int, np.ndarray] = {}
    try:
        async for i, events in generation:
            for event in events:
                if event.embedding is not None:
                    found[i] = event.embedding
                elif (error := unfinished(event.finish_reason, generation.engine.state)) is not None:
                    raise error
    finally:
        await generation.aclose()
    return [found[i] for i in range(len(generation.requests))]


def _shown(vector: np.ndarray, encoding_format: str | None) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
