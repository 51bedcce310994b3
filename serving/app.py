"""The HTTP application over one query engine: API, health checks, search page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware import Middleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from lookalike.artifacts import versions
from serving import routes
from serving.addresses import host_in_url, is_loopback
from serving.engine.query_engine import QueryEngine
from serving.middleware import BodyLimit, KnownHosts, RequestEnvelope
from serving.observability.exposition import metrics_response
from serving.observability.metrics import ServingMetrics
from serving.observability.observed_requests import ObservedRequests
from serving.observability.tracing import open_tracing
from serving.observability.watching import EngineState, watched
from serving.openapi import complete_openapi
from serving.problems import add_problem_handlers
from serving.safety.api_keys import Gate, open_keys
from serving.safety.key_file import KeyRing
from serving.safety.url_fetching import PictureFetcher
from serving.settings import ServingSettings

_PAGE_FOLDER = Path(__file__).parent / "page"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_TAGS = [
    {"name": "search", "description": "Find pictures that show the same thing."},
    {"name": "items", "description": "The pictures of the gallery."},
    {"name": "indexes", "description": "Versions of the gallery."},
    {"name": "info", "description": "What is served."},
    {"name": "health", "description": "For whoever keeps the server running."},
]


def create_app(engine: QueryEngine, settings: ServingSettings, metrics: ServingMetrics | None = None) -> FastAPI:
    """Builds the application, which takes `engine` over: it is closed when the application stops.

    Args:
        metrics: Those that the engine reports to.
    """
    told, keys = metrics or ServingMetrics(), open_keys(settings)
    tracing = open_tracing(sends_traces=settings.observability.sends_traces)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with watched(lambda: _state_of(engine), told, canary_seconds=settings.observability.canary_seconds):
            app.state.is_ready = True
            yield
            app.state.is_ready = False
        engine.close()
        tracing.close()

    app = FastAPI(
        title="Lookalike",
        summary="Finds the pictures that show the same thing as yours.",
        description="Errors are RFC 9457 problem details with a stable `code` and a `fix`.",
        version=versions().get("lookalike", "unknown"),
        openapi_tags=_TAGS,
        # The stock documentation pages load scripts from elsewhere, which our content-security policy forbids.
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(ObservedRequests, metrics=told, tracing=tracing), *_middleware(settings, keys)],
        lifespan=lifespan,
    )
    app.state.engine, app.state.settings, app.state.is_ready = engine, settings, False
    app.state.fetcher = PictureFetcher(settings.urls)
    add_problem_handlers(app)
    app.include_router(routes.api)
    app.include_router(routes.health)
    app.add_api_route("/metrics", lambda: metrics_response(told.registry), include_in_schema=False)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/page", StaticFiles(directory=_PAGE_FOLDER))
    complete_openapi(app, settings, requires_keys=keys is not None)
    return app


def _middleware(settings: ServingSettings, keys: KeyRing | None) -> list[Middleware]:
    """Outermost first."""
    layers = [Middleware(RequestEnvelope)]
    if is_loopback(settings.host):
        layers.append(Middleware(KnownHosts, hosts={*_LOCAL_HOSTS, host_in_url(settings.host).lower()}))
    limits = settings.limits
    return [
        *layers,
        Middleware(Gate, settings=settings, keys=keys),
        Middleware(
            BodyLimit,
            max_bytes=limits.max_body_bytes,
            max_seconds=limits.max_body_seconds,
            max_bytes_at_once=limits.max_bytes_at_once,
        ),
    ]


def _state_of(engine: QueryEngine) -> EngineState:
    served = engine.served()
    details = served.view.base.manifest.details
    effort = details["default_effort"]
    return EngineState(
        searcher=served.view,
        index_version=served.index_version,
        encoder_fingerprint=served.encoder_fingerprint,
        canary_ids=details["canary_ids"],
        expected_recall=next((p["recall"] for p in details["recall_curve"] if p["effort"] == effort), 1.0),
        measured_depth=details["measured_depth"],
        num_changes=engine.num_changes,
        queues=engine.queues(),
    )


async def _page() -> FileResponse:
    return FileResponse(_PAGE_FOLDER / "index.html")
