"""The routes together, and the one place where an exception becomes an answer."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.server.http.about import about_routes
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.chat import chat_routes
from jaxserve.server.http.completions import completions_routes
from jaxserve.server.http.embeddings import embeddings_routes
from jaxserve.server.http.errors import ANSWERED, DOCUMENTED, error_of, response_of
from jaxserve.server.http.live import live_routes
from jaxserve.server.http.loras import lora_routes
from jaxserve.server.http.plain import plain_routes


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Without the answer 422, which the framework documents and nobody gets."""
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema


def make_app(backend: Backend) -> FastAPI:
    """An ASGI application; ``/openapi.json`` describes it. Pages with code from elsewhere are not served."""
    app = _App(title="jaxserve", version=__version__, docs_url=None, redoc_url=None)
    models = (completions_routes, chat_routes, embeddings_routes, plain_routes, lora_routes)
    for routes in (*models, about_routes, live_routes):
        app.include_router(routes(backend), responses=DOCUMENTED)

    async def answer(http: Request, error: Exception) -> Response:
        return response_of(error_of(error, f"{http.method} {http.url.path}"))

    for kind in (*ANSWERED, RequestValidationError, HTTPException, Exception):  # the last: bugs, which are logged, too
        app.add_exception_handler(kind, answer)

    return app
