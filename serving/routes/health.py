"""Health checks, for whoever keeps the server running."""

from fastapi import APIRouter, Request

from serving.problems import Problem, problem_responses
from serving.schemas.info import HealthAnswer

router = APIRouter(tags=["health"])
_ALWAYS = ("host.not_allowed", "server.busy")


@router.get("/livez", responses=problem_responses(*_ALWAYS))
async def livez() -> HealthAnswer:
    """The process answers."""
    return HealthAnswer()


@router.get("/readyz", responses=problem_responses("server.not_ready", *_ALWAYS))
async def readyz(request: Request) -> HealthAnswer:
    """The server takes queries."""
    if not request.app.state.is_ready:
        raise Problem("server.not_ready", "the server is starting or stopping", headers={"Retry-After": "1"})
    return HealthAnswer()
