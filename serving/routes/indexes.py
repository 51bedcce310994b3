"""/v1/indexes: the versions of the index, and changing over between them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request

from lookalike.errors import ArtifactError, ResourceError
from serving.engine.errors import CompactionFailedError, without_folders
from serving.engine.query_engine import QueryEngine
from serving.problems import Problem
from serving.request_bodies import read_json
from serving.routes.state import FOR_WRITERS, WRITING_PROBLEMS, Engine, problems
from serving.schemas.indexes import CurrentVersionAnswer, IndexesAnswer, SwapRequest, VersionAnswer

logger = logging.getLogger(__name__)
router = APIRouter(tags=["indexes"])

_RETRY_SECONDS = "10"
_SWAP_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/SwapRequest"},
                "examples": {"to the first": {"value": {"version": "v0001"}}},
            }
        },
    }
}


@router.get("/indexes", responses=problems("index.busy", "server.overloaded"))
async def list_versions(engine: Engine) -> IndexesAnswer:
    """The versions in the index folder, and which of them searches use."""
    try:
        found = await engine.versions()
    except ArtifactError as error:
        logger.error("the versions of the index cannot be told: %s", error)
        detail = f"the index folder does not tell which version is to serve; searches go on with {engine.index.version}"
        raise Problem("index.busy", detail, headers={"Retry-After": _RETRY_SECONDS}) from error
    return IndexesAnswer(
        current=found.current,
        served=found.served,
        num_changes=found.num_changes,
        versions=[
            VersionAnswer(
                version=version.name,
                is_current=version.is_current,
                index_type=version.index_type,
                num_vectors=version.num_vectors,
                dim=version.dim,
                encoder_fingerprint=version.encoder_fingerprint,
                num_changes_since=version.num_changes_since,
            )
            for version in found.versions
        ],
    )


@router.post(
    "/indexes:swap",
    dependencies=FOR_WRITERS,
    openapi_extra=_SWAP_BODY,
    responses=problems(
        "request.malformed",
        "body.too_slow",
        "body.too_large",
        "body.unsupported_type",
        "request.invalid",
        "version.unknown",
        "version.refused",
        *WRITING_PROBLEMS,
    ),
)
async def swap(request: Request, engine: Engine) -> CurrentVersionAnswer:
    """Changes over to a version, once it has been opened and checked; searches go on meanwhile."""
    wanted = await read_json(request, SwapRequest)
    with _refusals_named(engine):
        return CurrentVersionAnswer(current=await engine.swap(wanted.version))


@router.post(
    "/indexes:rollback",
    dependencies=FOR_WRITERS,
    responses=problems("version.unknown", "version.refused", *WRITING_PROBLEMS),
)
async def rollback(engine: Engine) -> CurrentVersionAnswer:
    """Changes over to the version before the current one."""
    with _refusals_named(engine):
        return CurrentVersionAnswer(current=await engine.rollback())


@router.post(
    "/indexes:compact",
    dependencies=FOR_WRITERS,
    responses=problems("version.refused", "index.compaction_failed", *WRITING_PROBLEMS),
)
async def compact(engine: Engine) -> CurrentVersionAnswer:
    """Makes a version that holds all changes since the current one, and changes over to it. Answers when that is done,
    which takes as long as building an index; whoever leaves earlier does not stop it."""
    with _refusals_named(engine):
        return CurrentVersionAnswer(current=await engine.compact())


@contextmanager
def _refusals_named(engine: QueryEngine) -> Iterator[None]:
    """As for a search of a version: what lies where is in the log alone."""
    try:
        yield
    except (ArtifactError, ResourceError) as error:
        logger.warning("versions stay as they are: %s", error)
        detail = without_folders(str(error), engine.index.folder.parent)
        if isinstance(error, ArtifactError):
            raise Problem("version.refused", detail) from error
        if isinstance(error, CompactionFailedError):
            raise Problem("index.compaction_failed", detail) from error
        raise Problem("index.busy", detail, headers={"Retry-After": _RETRY_SECONDS}) from error
