"""GET /v1/info."""

from fastapi import APIRouter, Request

from indexing.reranking.settings import METHOD_NAMES
from lookalike.artifacts import versions
from serving.routes.state import Engine, Limits, problems
from serving.schemas.info import InfoAnswer, LimitsAnswer

router = APIRouter(tags=["info"])


@router.get("/info", responses=problems())
async def info(request: Request, engine: Engine, limits: Limits) -> InfoAnswer:
    """What is served, by what, within which limits."""
    served = engine.served()
    index = served.view.base
    details = index.manifest.details
    given = limits.model_dump()
    return InfoAnswer(
        index_version=index.version,
        index_fingerprint=index.fingerprint,
        index_type=details["type"],
        encoder_fingerprint=served.encoder_fingerprint,
        transform_fingerprint=details.get("transform_fingerprint"),
        takes_pictures=served.encoder is not None,
        num_vectors=served.view.num_vectors,
        dim=index.dim,
        default_effort=details["default_effort"],
        target_recall=details["target_recall"],
        recall_curve=details["recall_curve"],
        metadata_columns=index.metadata.column_names,
        rerank_methods=list(METHOD_NAMES),
        has_pictures=served.shards is not None,
        limits=LimitsAnswer(
            **{name: given[name] for name in LimitsAnswer.model_fields if name in given},
            max_pixels=limits.pictures.max_pixels,
        ),
        scopes=sorted(request.state.caller.scopes),
        versions=versions(),
    )
