"""What routes find in the application's state."""

from typing import Annotated, Any

from fastapi import Depends, Path, Request

from serving.engine.query_engine import QueryEngine
from serving.problems import problem_responses
from serving.safety.api_keys import requires_scope
from serving.schemas.fields import LARGEST_ID
from serving.settings import ServingLimits, ServingSettings


async def _engine_of(request: Request) -> QueryEngine:
    return request.app.state.engine


async def _settings_of(request: Request) -> ServingSettings:
    return request.app.state.settings


async def _limits_of(request: Request) -> ServingLimits:
    return request.app.state.settings.limits


Engine = Annotated[QueryEngine, Depends(_engine_of)]
Serving = Annotated[ServingSettings, Depends(_settings_of)]
Limits = Annotated[ServingLimits, Depends(_limits_of)]
IdInPath = Annotated[int, Path(ge=0, le=LARGEST_ID, description="As in a hit.", examples=[0])]
FOR_WRITERS = [Depends(requires_scope("write"))]
WRITING_PROBLEMS = ("writes.off", "origin.not_allowed", "index.busy")
# What any route can end in, before or whatever it does.
_ALWAYS = (
    "host.not_allowed",
    "key.missing",
    "key.unknown",
    "key.lacks_scope",
    "rate.exceeded",
    "server.busy",
    "server.error",
)


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """For `responses` of a route: those that it can end in, and those of all routes.

    A router's own would not do: where a route and its router name one status, the framework forgets the router's.
    """
    return problem_responses(*codes, *_ALWAYS)
