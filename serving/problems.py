"""The one shape of every error: RFC 9457 problem details, with a stable `code` and what to do next in `fix`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Mount

from lookalike.errors import DecodeError
from serving.engine.errors import (
    CompactionFailedError,
    ComparisonOffError,
    EncoderUnavailableError,
    IdTakenError,
    OverloadedError,
    PicturesUnavailableError,
    UnfitItemError,
    UnknownItemError,
    UnknownVersionError,
    UnsearchableFilterError,
    UnsearchableRegionError,
    UnsearchableVectorError,
    VersionRefusedError,
    VersionUnavailableError,
)
from serving.safety.rate_limit import retry_after
from serving.schemas.problems import FieldError, ProblemDetails

PROBLEM_MEDIA_TYPE = "application/problem+json"
_MOST_ERRORS = 20
_RETRY_SECONDS = "10"  # after versions could not be opened or changed over
_LONGEST_FIELD_NAME = 100
_CHALLENGE, _PAUSE = "WWW-Authenticate", "Retry-After"
# What pydantic puts before the words of a ValueError.
_VALUE_ERROR = "Value error, "
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True, slots=True)
class ProblemKind:
    status: int
    fix: str
    header: str | None = None  # that always comes with it


# Clients branch on these codes: a code is never renamed, and never gets another status.
PROBLEM_KINDS: Mapping[str, ProblemKind] = {
    "request.malformed": ProblemKind(400, "Send well-formed JSON, or multipart/form-data with a boundary."),
    "request.invalid": ProblemKind(422, "Correct the fields named in `errors`; /openapi.json describes each."),
    "request.refused": ProblemKind(400, "See /openapi.json for what this server understands."),
    "host.not_allowed": ProblemKind(421, "Open the address that the server printed; a proxy must send it as Host."),
    "origin.not_allowed": ProblemKind(403, "Change the gallery from the server's own page, or from a program."),
    "key.missing": ProblemKind(401, "Send `Authorization: Bearer KEY`; the server's operator makes keys.", _CHALLENGE),
    "key.unknown": ProblemKind(
        401, "Check the key for missing characters, or ask the server's operator for one.", _CHALLENGE
    ),
    "key.lacks_scope": ProblemKind(403, "Use a key with the scope that the detail names.", _CHALLENGE),
    "writes.off": ProblemKind(
        403, "To add and delete, give it keys, or `allows_writes: true` in the file of --settings."
    ),
    "rate.exceeded": ProblemKind(429, "Wait as long as Retry-After says; send fewer requests a second.", _PAUSE),
    "server.busy": ProblemKind(503, "Try again as soon as Retry-After says.", _PAUSE),
    "route.unknown": ProblemKind(404, "See /openapi.json for the routes of this server."),
    "method.not_allowed": ProblemKind(405, "Use a method named in the Allow header."),
    "body.too_large": ProblemKind(413, "Send a smaller picture; /v1/info tells the limit."),
    "body.too_slow": ProblemKind(408, "Send the body faster, or a smaller picture."),
    "url.off": ProblemKind(422, "Send the picture itself; this server fetches nothing."),
    "url.not_allowed": ProblemKind(422, "Send the picture itself, or an address on a host this server fetches from."),
    "url.unreachable": ProblemKind(422, "Check that the address shows the picture, or send the picture itself."),
    "url.too_large": ProblemKind(413, "Name a smaller picture."),
    "url.too_slow": ProblemKind(422, "Try again, or send the picture itself."),
    "body.unsupported_type": ProblemKind(415, "Send a type that the Accept-Post header names.", "Accept-Post"),
    "image.empty": ProblemKind(422, "Send the bytes of a picture."),
    "image.not_an_image": ProblemKind(415, "Send a picture, such as a JPEG, PNG or WebP file."),
    "image.format_not_allowed": ProblemKind(415, "Save the picture as JPEG, PNG or WebP and send that."),
    "image.truncated": ProblemKind(422, "The file is incomplete: get it again from where it came from."),
    "image.too_many_pixels": ProblemKind(413, "Scale the picture down; search needs far fewer pixels."),
    "image.absurd_size": ProblemKind(422, "Send a picture of more ordinary proportions."),
    "image.undecodable": ProblemKind(422, "Save the picture as JPEG, PNG or WebP and send that."),
    "roi.empty": ProblemKind(422, "Send left, top, right, bottom, with right and bottom a pixel further or more."),
    "roi.outside": ProblemKind(422, "Send a region of the picture as a viewer shows it, turned upright."),
    "item.unknown": ProblemKind(404, "Take an id from a search of this index version, or from GET /v1/items."),
    "pictures.unavailable": ProblemKind(
        404, "If it came from shards, start with --shards; a vector alone has none: PUT it."
    ),
    "vector.wrong_dim": ProblemKind(422, "Send a vector of the encoder that /v1/info names; it also tells the length."),
    "vector.not_finite": ProblemKind(422, "Send finite numbers only."),
    "vector.no_direction": ProblemKind(422, "Send a vector with at least one value other than zero."),
    "vector.cancelled_out": ProblemKind(422, "Choose parts or weights that do not cancel each other out."),
    "filter.invalid": ProblemKind(422, "Correct the condition; /v1/info names the columns that the metadata have."),
    "encoder.unavailable": ProblemKind(422, "Use an id or a vector; /v1/info tells whether a server takes pictures."),
    "item.exists": ProblemKind(409, "Choose another id, or none; or say replace, or PUT it."),
    "item.unfit": ProblemKind(422, "Correct the metadata or the id; /v1/info names the columns that there are."),
    "version.unknown": ProblemKind(404, "Take a version from GET /v1/indexes."),
    "version.refused": ProblemKind(409, "Choose another version, or build one that goes with what the detail names."),
    "version.off": ProblemKind(422, "Leave `version` out; this server searches only the version that serves."),
    "index.busy": ProblemKind(503, "Try again as soon as Retry-After says.", _PAUSE),
    "index.compaction_failed": ProblemKind(500, "See the detail and the server's log, mend that, and compact again."),
    "server.overloaded": ProblemKind(429, "Try again as soon as Retry-After says.", _PAUSE),
    "server.not_ready": ProblemKind(503, "Try again shortly; /readyz tells when the server is ready.", _PAUSE),
    "server.error": ProblemKind(500, "Try again; if it persists, give the request id to the server's operator."),
}

# Errors whose words are the problem's detail.
_CODES: Mapping[type[Exception], str] = {
    UnsearchableFilterError: "filter.invalid",
    EncoderUnavailableError: "encoder.unavailable",
    UnknownItemError: "item.unknown",
    IdTakenError: "item.exists",
    UnfitItemError: "item.unfit",
    UnknownVersionError: "version.unknown",
    VersionRefusedError: "version.refused",
    ComparisonOffError: "version.off",
    PicturesUnavailableError: "pictures.unavailable",
    CompactionFailedError: "index.compaction_failed",
}


class Problem(Exception):
    """Ends a request with a problem response."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.errors, self.headers = code, detail, list(errors), dict(headers or {})
        self.kind = PROBLEM_KINDS[code]


def problem_details(problem: Problem, *, request_id: str) -> dict[str, Any]:
    details = ProblemDetails(
        title=HTTPStatus(problem.kind.status).phrase,
        status=problem.kind.status,
        detail=problem.detail,
        code=problem.code,
        fix=problem.kind.fix,
        request_id=request_id,
        errors=problem.errors or None,
    )
    return details.model_dump(exclude_none=True)


def problem_response(problem: Problem, *, request_id: str) -> JSONResponse:
    return JSONResponse(
        problem_details(problem, request_id=request_id),
        status_code=problem.kind.status,
        headers=problem.headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def invalid_field(field: str, message: str) -> Problem:
    error = _field_error(field, message)
    return Problem("request.invalid", f"{error.field}: {error.message}", errors=[error])


def invalid_request(error: ValidationError | RequestValidationError) -> Problem:
    """Names the first refused fields and counts the others; the refused values themselves are not sent back."""
    found = error.errors()
    if any(entry["type"] == "json_invalid" for entry in found):
        return Problem("request.malformed", f"the body is not JSON: {found[0]['msg']}")
    errors = [
        _field_error(_field_name(entry["loc"]), entry["msg"].removeprefix(_VALUE_ERROR))
        for entry in found[:_MOST_ERRORS]
    ]
    sentences = [f"{error.field}: {error.message}" for error in errors]
    if len(found) > len(errors):
        sentences.append(f"and {len(found) - len(errors)} more")
    return Problem("request.invalid", "; ".join(sentences), errors=errors)


def problem_of(error: Exception) -> Problem:
    """What a client is told about an error; unexpected ones tell nothing about the server's inside."""
    match error:
        case Problem():
            return error
        case RequestValidationError() | ValidationError():
            return invalid_request(error)
        case DecodeError(reason=reason):
            code = f"image.{reason}"
            return Problem(code if code in PROBLEM_KINDS else "image.undecodable", str(error))
        case UnsearchableRegionError(reason=reason):
            return Problem(f"roi.{reason}", str(error))
        case UnsearchableVectorError(reason=reason):
            return Problem(f"vector.{reason}", str(error))
        case VersionUnavailableError():
            return Problem("index.busy", str(error), headers={"Retry-After": _RETRY_SECONDS})
        case OverloadedError(retry_after_seconds=seconds):
            return Problem("server.overloaded", str(error), headers={"Retry-After": retry_after(seconds)})
        case HTTPException(status_code=404):
            return Problem("route.unknown", "nothing is at this address")
        case HTTPException(status_code=405, headers=headers):
            return Problem("method.not_allowed", "this address does not take this method", headers=headers)
        case HTTPException(detail=detail, headers=headers):
            return Problem("request.refused", str(detail), headers=headers)
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return Problem(code, str(error))
    return Problem("server.error", "the server met an error it did not expect")


def add_problem_handlers(app: FastAPI) -> None:
    """Known errors become problems here; unexpected ones reach the outermost middleware, which logs them."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        if problem.code == "method.not_allowed":
            problem.headers["Allow"] = ", ".join(_methods_at(request, app.routes))
        request.state.problem_code = problem.code  # for the metrics
        return problem_response(problem, request_id=request.state.request_id)

    for kind in (
        Problem,
        RequestValidationError,
        HTTPException,
        DecodeError,
        UnsearchableRegionError,
        UnsearchableVectorError,
        VersionUnavailableError,
        OverloadedError,
        *_CODES,
    ):
        app.add_exception_handler(kind, answer)


def _methods_at(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """All methods that the request's address takes: the framework names those of one of its routes alone."""
    found = [
        method
        for method in _METHODS
        if any(
            not isinstance(route, Mount) and route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in routes
        )
    ]
    return found or ["GET", "HEAD"]  # a file of the page


def problem_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of a route that can end in these problems."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status = PROBLEM_KINDS[code].status
        content = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "examples": {}}
        entry = responses.setdefault(
            status, {"description": HTTPStatus(status).phrase, "content": {PROBLEM_MEDIA_TYPE: content}}
        )
        entry["content"][PROBLEM_MEDIA_TYPE]["examples"][code] = {"value": _example(code)}
    return responses


def _example(code: str) -> dict[str, Any]:
    kind = PROBLEM_KINDS[code]
    return {
        "title": HTTPStatus(kind.status).phrase,
        "status": kind.status,
        "detail": "what was wrong with this request",
        "code": code,
        "fix": kind.fix,
        "request_id": "5f1c6c1d0e9b4c39a0f6d6a0b5a4c7e2",
    }


def _field_error(field: str, message: str) -> FieldError:
    """Shortens the name, which may come from the client."""
    shown = field if len(field) <= _LONGEST_FIELD_NAME else field[: _LONGEST_FIELD_NAME - 1] + "…"
    return FieldError(field=shown, message=message)


def _field_name(location: Sequence[Any]) -> str:
    """`("query", "sample")` -> `sample`: clients know their fields, not where the framework looked."""
    parts = [str(part) for part in location if part not in ("body", "query", "path", "header")]
    return ".".join(parts) or "(request)"
