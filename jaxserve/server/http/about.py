"""What is served and how it is: models, tokens, health, metrics."""

import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from jaxserve import __version__
from jaxserve.errors import RequestError
from jaxserve.server.chat.conversation import encode_conversation
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.errors import NO_SUCH_MODEL, NOT_SERVING, HTTPError
from jaxserve.server.http.fields import (
    BOOLEAN,
    MESSAGES,
    OBJECT,
    TOKEN_IDS,
    TOOLS,
    boolean,
    continuation_of,
    optional,
    prompt_or_messages,
    required,
)
from jaxserve.server.http.generation import in_thread
from jaxserve.server.http.routes import Routes
from jaxserve.server.prompts import check_bytes, check_fits, tokenizer_of

OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
OF_PROMPT = ("add_special_tokens",)


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=prompt_or_messages(OF_PROMPT, OF_MESSAGES))

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: Any = optional(BOOLEAN)
    messages: Any = optional(MESSAGES)
    add_generation_prompt: Any = optional(BOOLEAN)
    continue_final_message: Any = optional(BOOLEAN)
    chat_template_kwargs: Any = optional(OBJECT)
    tools: Any = optional(TOOLS)
    return_token_strs: Any = optional(BOOLEAN)


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: Any = required(TOKEN_IDS)
    skip_special_tokens: Any = optional(BOOLEAN)


def about_routes(backend: Backend) -> APIRouter:
    router = Routes()
    started = int(time.time())

    @router.get("/health", tags=["Operation"])
    async def health() -> Response:
        """200 while the process can serve or will: loading, ready or draining. 503 once the engine has failed."""
        state = backend.async_engine.state
        return JSONResponse({"status": state}, 503 if state in ("failed", "closed") else 200)

    @router.get("/ready", tags=["Operation"])
    async def ready() -> Response:
        """200 while requests are taken, 503 while loading, draining, or failed."""
        state = backend.async_engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/version", tags=["Operation"])
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics", tags=["Operation"])
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(generate_latest(backend.registry), media_type=CONTENT_TYPE_LATEST)

    def cards() -> list[dict[str, Any]]:
        base = backend.model_names()
        found = [(name, backend.engine.model_name, None) for name in base]
        found += [(a.name, a.path, base[0]) for a in backend.engine.list_loras()]
        return [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "jaxserve",
                "root": root,
                "parent": parent,
                "max_model_len": backend.engine.scheduler_config.max_model_len,
            }
            for name, root, parent in found
        ]

    def check_ready() -> None:
        if backend.async_engine.state not in ("ready", "draining"):
            raise HTTPError(NOT_SERVING, f"the engine is {backend.async_engine.state}")

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The model under each of its names, then the adapters that are loaded, whose `parent` it is."""
        check_ready()
        return {"object": "list", "data": cards()}

    @router.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        check_ready()
        card = next((card for card in cards() if card["id"] == name), None)
        if card is None:
            raise HTTPError(NO_SUCH_MODEL, f"model: {name!r:.200} is not served here", "model")
        return card

    @router.post("/tokenize", tags=["Tokens"])
    async def tokenize(body: TokenizeRequest, http: Request) -> dict[str, Any]:
        """Token ids of a text or a conversation, as the generating routes would read them."""
        backend.check_model(body.model)
        token_ids = await in_thread({}, lambda: _tokenize(backend, body))
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": backend.engine.scheduler_config.max_model_len,
            "tokens": token_ids,
        }
        if boolean("return_token_strs", body.return_token_strs, False):
            tokenizer = tokenizer_of(backend.engine, "prompt")
            answer["token_strs"] = [tokenizer.token_bytes(i).decode(errors="replace") for i in token_ids]
        return answer

    @router.post("/detokenize", tags=["Tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Text of token ids."""
        backend.check_model(body.model)
        return {"prompt": await in_thread({}, lambda: _detokenize(backend, body))}

    return router


def _tokenize(backend: Backend, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt", "give exactly one of prompt, messages")
    if body.prompt is not None:
        tokenizer = tokenizer_of(backend.engine, "prompt")
        for name in OF_MESSAGES:
            if getattr(body, name) is not None:
                raise RequestError(name, "is for messages, not for a prompt")
        check_bytes("prompt", body.prompt, backend.options.max_prompt_bytes)
        check_fits(backend.engine, tokenizer, "prompt", body.prompt)
        special = boolean("add_special_tokens", body.add_special_tokens, True)
        return tokenizer.encode(body.prompt, add_special_tokens=special)
    if body.add_special_tokens is not None:
        raise RequestError("add_special_tokens", "is for a prompt: a chat template writes its own")
    return encode_conversation(
        backend.engine,
        body.messages,
        backend.options.max_prompt_bytes,
        cut=False,
        **continuation_of(body.add_generation_prompt, body.continue_final_message),
        tools=body.tools,
        variables=body.chat_template_kwargs,
    )


def _detokenize(backend: Backend, body: DetokenizeRequest) -> str:
    tokenizer = tokenizer_of(backend.engine, "tokens")
    if not isinstance(body.tokens, list):
        raise RequestError("tokens", f"{body.tokens!r:.80} is not a list")
    for i in body.tokens:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < tokenizer.vocab_size:
            raise RequestError("tokens", f"{i!r:.40} is not a token id, the vocabulary has {tokenizer.vocab_size}")
    return tokenizer.decode(
        body.tokens, skip_special_tokens=boolean("skip_special_tokens", body.skip_special_tokens, False)
    )
