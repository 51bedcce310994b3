"""GET /v1/info."""

from fastapi import APIRouter, Request

from indexing.reranking.settings import METHOD_NAMES
from lookalike.artifacts import versions
from serving.routes.state import Engine, Serving, problems
from serving.schemas.info import InfoAnswer, LimitsAnswer, RateLimitAnswer

router = APIRouter(tags=["info"])


@router.get("/info", responses=problems())
async def info(request: Request, engine: Engine, settings: Serving) -> InfoAnswer:
    """What is served, by what, within which limits."""
    served = engine.served()
    index = served.view.base
    details = index.manifest.details
    limits = settings.limits
    # Last, because a connection may also keep the server waiting for `max_wait_seconds`, of which nobody needs to know.
    bounds = {**limits.pictures.model_dump(), **limits.model_dump(), **engine.settings.model_dump()}
    is_counted = hasattr(request.state, "buckets")
    return InfoAnswer(
        index_version=index.version,
        index_fingerprint=index.fingerprint,
        index_type=details["type"],
        encoder_fingerprint=served.encoder_fingerprint,
        transform_fingerprint=details.get("transform_fingerprint"),
        takes_pictures=served.encoder is not None,
        takes_urls=served.encoder is not None and bool(settings.urls.hosts),
        num_vectors=served.view.num_vectors,
        dim=index.dim,
        default_effort=details["default_effort"],
        target_recall=details["target_recall"],
        recall_curve=details["recall_curve"],
        metadata_columns=index.metadata.column_names,
        rerank_methods=list(METHOD_NAMES),
        has_pictures=served.shards is not None,
        limits=LimitsAnswer.model_validate(bounds),
        rate_limit=RateLimitAnswer.model_validate(settings.rate_limit.model_dump()) if is_counted else None,
        scopes=sorted(request.state.caller.scopes),
        versions=versions(),
    )
