"""/v1/indexes: the versions of the index, and changing over between them."""

from fastapi import APIRouter, Request

from serving.request_bodies import read_json
from serving.routes.state import FOR_WRITERS, WRITING_PROBLEMS, Engine, problems
from serving.schemas.indexes import CurrentVersionAnswer, IndexesAnswer, SwapRequest, VersionAnswer

router = APIRouter(tags=["indexes"])

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
    found = await engine.versions()
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
    return CurrentVersionAnswer(current=await engine.swap(wanted.version))


@router.post(
    "/indexes:rollback",
    dependencies=FOR_WRITERS,
    responses=problems("version.unknown", "version.refused", *WRITING_PROBLEMS),
)
async def rollback(engine: Engine) -> CurrentVersionAnswer:
    """Changes over to the version before the current one."""
    return CurrentVersionAnswer(current=await engine.rollback())


@router.post(
    "/indexes:compact",
    dependencies=FOR_WRITERS,
    responses=problems("version.refused", "index.compaction_failed", *WRITING_PROBLEMS),
)
async def compact(engine: Engine) -> CurrentVersionAnswer:
    """Makes a version that holds all changes since the current one, and changes over to it. Answers when that is done,
    which takes as long as building an index; whoever leaves earlier does not stop it."""
    return CurrentVersionAnswer(current=await engine.compact())
