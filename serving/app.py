"""The HTTP application over one query engine: API, health checks, search page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema

from lookalike.artifacts import versions
from serving import routes
from serving.addresses import host_in_url, is_loopback
from serving.middleware import BodyLimit, KnownHosts, RequestEnvelope
from serving.problems import add_problem_handlers
from serving.query_engine import QueryEngine
from serving.schemas import ProblemDetails, SearchForm, SearchRequest
from serving.settings import ServingSettings

_PAGE_FOLDER = Path(__file__).parent / "page"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_TAGS = [
    {"name": "search", "description": "Find pictures that show the same thing."},
    {"name": "items", "description": "The pictures of the gallery."},
    {"name": "info", "description": "What is served."},
    {"name": "health", "description": "For whoever keeps the server running."},
]


def create_app(engine: QueryEngine, settings: ServingSettings) -> FastAPI:
    """Builds the application, which takes `engine` over: it is closed when the application stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.is_ready = True
        yield
        app.state.is_ready = False
        engine.close()

    app = FastAPI(
        title="Lookalike",
        summary="Finds the pictures that show the same thing as yours.",
        description="Errors are RFC 9457 problem details with a stable `code` and a `fix`.",
        version=versions().get("lookalike", "unknown"),
        openapi_tags=_TAGS,
        # The stock documentation pages load scripts from elsewhere, which our content-security policy forbids.
        docs_url=None,
        redoc_url=None,
        middleware=_middleware(settings),
        lifespan=lifespan,
    )
    app.state.engine, app.state.limits, app.state.is_ready = engine, settings.limits, False
    add_problem_handlers(app)
    app.include_router(routes.api)
    app.include_router(routes.health)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/page", StaticFiles(directory=_PAGE_FOLDER))
    _complete_openapi(app)
    return app


def _middleware(settings: ServingSettings) -> list[Middleware]:
    """Outermost first."""
    layers = [Middleware(RequestEnvelope)]
    if is_loopback(settings.host):
        layers.append(Middleware(KnownHosts, hosts={*_LOCAL_HOSTS, host_in_url(settings.host).lower()}))
    return [*layers, Middleware(BodyLimit, max_bytes=settings.limits.max_body_bytes)]


async def _page() -> FileResponse:
    return FileResponse(_PAGE_FOLDER / "index.html")


def _complete_openapi(app: FastAPI) -> None:
    """Adds the models that routes refer to by name, because they read their bodies themselves."""
    generate = app.openapi

    def complete() -> dict[str, Any]:
        is_complete = app.openapi_schema is not None
        document = generate()
        if not is_complete:
            _, definitions = models_json_schema(
                [(SearchRequest, "validation"), (SearchForm, "validation"), (ProblemDetails, "serialization")],
                ref_template="#/components/schemas/{model}",
            )
            document["components"]["schemas"].update(definitions["$defs"])
        return document

    app.openapi = complete  # type: ignore[method-assign]
