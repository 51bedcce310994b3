"""Search requests, whatever they are written in: JSON or a multipart form with a picture file."""

import asyncio

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.problems import Problem, invalid_field, invalid_request
from serving.schemas import LONGEST_VECTOR, SearchForm, SearchRequest
from serving.settings import ServingLimits

_MOST_FORM_FIELDS = 8
# A vector's and every other field's, with room for some mistakes that are then named.
_MOST_COMMAS = LONGEST_VECTOR + 64
_MOST_BYTES_ON_THE_LOOP = 64 << 10


async def read_search_request(request: Request, limits: ServingLimits) -> SearchRequest:
    """Reads and checks the body.

    Raises:
        Problem: it is of another type, malformed, or a field is refused; the first refused fields are named.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        match media_type:
            case "application/json":
                query = await _read_json(await request.body())
            case "multipart/form-data":
                query = SearchRequest.model_validate(await _read_form(request, limits))
            case _:
                found = f"the body is {media_type}" if media_type else "the request has no Content-Type"
                accepted = {"Accept-Post": "multipart/form-data, application/json"}
                raise Problem("body.unsupported_type", found, headers=accepted)
    except ValidationError as error:
        raise invalid_request(error) from None
    if query.k > limits.max_k:
        raise invalid_field("k", f"this server gives at most {limits.max_k} hits, {query.k} were asked for")
    return query


async def _read_json(body: bytes) -> SearchRequest:
    if len(body) <= _MOST_BYTES_ON_THE_LOOP:
        return SearchRequest.model_validate_json(body, strict=True)
    # Parsing holds the interpreter's lock, so a thread is no help against a body of millions of values, which takes
    # seconds. Commas bound their number, and no field of a search needs one within a text.
    num_commas = body.count(b",")
    if num_commas > _MOST_COMMAS:
        raise invalid_field("(request)", f"holds about {num_commas} values; a search has at most {LONGEST_VECTOR}")
    return await asyncio.to_thread(SearchRequest.model_validate_json, body, strict=True)


async def _read_form(request: Request, limits: ServingLimits) -> dict[str, str | bytes | list[str]]:
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=_MOST_FORM_FIELDS)
    # Uploads stay in memory: by default Starlette writes what is longer than 1 MiB to a temporary file.
    parser.spool_max_size = limits.max_body_bytes
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem("request.malformed", f"the form cannot be read: {error.message}") from error
    fields: dict[str, str | bytes | list[str]] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise invalid_field(name, "given twice")
        if name not in SearchForm.model_fields:
            raise invalid_field(name, f"there is no such field; a form has {', '.join(SearchForm.model_fields)}")
        if isinstance(value, UploadFile) != (name == "image"):
            raise invalid_field(name, "must be a file" if name == "image" else "must not be a file")
        if isinstance(value, UploadFile):
            fields[name] = await value.read()
        else:
            # One part too many is enough to be refused, whatever else follows.
            fields[name] = value.split(",", 4) if name == "roi" else value
    await form.close()
    if "image" not in fields:
        raise invalid_field("image", "a form needs a picture file under this name")
    return fields
