"""What clients send, whatever it is written in: JSON, multipart forms with picture files, or a vector's numbers."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.problems import Problem, invalid_field, invalid_request
from serving.schemas.fields import LONGEST_VECTOR, RequestModel, numbers_of_bytes
from serving.schemas.items import NewItem, NewItemForm, ReplacingItem, ReplacingItemForm
from serving.schemas.search import BatchRequest, SearchForm, SearchRequest
from serving.settings import ServingLimits

_JSON, _FORM, _NUMBERS = "application/json", "multipart/form-data", "application/octet-stream"
_MOST_FORM_FIELDS = 16
# A vector's or a long filter's, and every other field's, with room for some mistakes that are then named.
_MOST_COMMAS = LONGEST_VECTOR + 64
_MOST_BYTES_ON_THE_LOOP = 64 << 10
# What a search by the numbers of a vector has beside them, in its address.
ADDRESS_FIELDS = ("k", "exact", "recall", "filter", "rerank", "include", "version")

Model = TypeVar("Model", bound=RequestModel)


async def read_search(request: Request, limits: ServingLimits) -> SearchRequest:
    """Reads and checks the body of a search.

    Raises:
        Problem: it is of another type, malformed, or a field is refused; the first refused fields are named.
    """
    media_type = _media_type(request)
    match media_type:
        case "application/json":
            _require_bare_address(request)
            search = await _read_json(await request.body(), SearchRequest)
        case "multipart/form-data":
            _require_bare_address(request)
            search = _checked(SearchRequest, _search_of_form(await _read_form(request, limits, limits.max_parts)))
        case "application/octet-stream":
            search = _checked(SearchRequest, _search_of_numbers(await request.body(), request.query_params))
        case _:
            raise _unsupported(media_type, _FORM, _JSON, _NUMBERS)
    require_within_limits(search, limits)
    return search


async def read_batch(request: Request, limits: ServingLimits, *, dim: int) -> list[SearchRequest | Problem]:
    """The searches of a batch, and in place of those that are refused the reason.

    Args:
        dim: Greatest length of the vectors of any version, which bounds how long a batch can be.

    Raises:
        Problem: the batch as a whole is refused.
    """
    media_type = _media_type(request)
    if media_type != _JSON:
        raise _unsupported(media_type, _JSON)
    most_commas = _MOST_COMMAS + limits.max_queries * (dim + 64)
    batch = await _read_json(await request.body(), BatchRequest, most_commas=most_commas)
    if len(batch.searches) > limits.max_queries:
        raise invalid_field("searches", f"this server takes at most {limits.max_queries}, found {len(batch.searches)}")
    return [_search_or_problem(search, limits) for search in batch.searches]


async def read_new_item(request: Request, limits: ServingLimits) -> NewItem:
    """Raises Problem as `read_search` does."""
    return await _read_item(request, limits, NewItem, NewItemForm)


async def read_replacing_item(request: Request, limits: ServingLimits) -> ReplacingItem:
    """Raises Problem as `read_search` does."""
    return await _read_item(request, limits, ReplacingItem, ReplacingItemForm)


async def read_json(request: Request, model: type[Model]) -> Model:
    """Raises Problem as `read_search` does."""
    media_type = _media_type(request)
    if media_type != _JSON:
        raise _unsupported(media_type, _JSON)
    return await _read_json(await request.body(), model)


def require_within_limits(search: SearchRequest, limits: ServingLimits) -> None:
    """Raises Problem where a search asks for more than this server gives."""
    if search.k > limits.max_k:
        raise invalid_field("k", f"this server gives at most {limits.max_k} hits, {search.k} were asked for")
    if search.parts is not None and len(search.parts) > limits.max_parts:
        raise invalid_field("parts", f"this server takes at most {limits.max_parts}, found {len(search.parts)}")
    if search.rerank is None:
        return
    for name in ("shortlist", "num_neighbours"):
        number = getattr(search.rerank, name, 0)
        if number > limits.max_shortlist:
            raise invalid_field(f"rerank.{name}", f"at most {limits.max_shortlist} on this server, found {number}")


def parsed_json(name: str, text: str) -> Any:
    """Raises Problem where a field that is to hold JSON does not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid_field(name, "not JSON") from error


@dataclass(frozen=True, slots=True)
class _Form:
    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported(media_type: str, *accepted: str) -> Problem:
    found = f"the body is {media_type}" if media_type else "the request has no Content-Type"
    taken = " or ".join(accepted)
    return Problem("body.unsupported_type", f"{found}; send {taken}", headers={"Accept-Post": ", ".join(accepted)})


def _require_bare_address(request: Request) -> None:
    if request.scope["query_string"]:
        name = next(iter(request.query_params), "(request)")
        raise invalid_field(name, f"belongs into the body; an address has fields beside {_NUMBERS} only")


def _checked(model: type[Model], tree: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise invalid_request(error) from None


async def _read_json(body: bytes, model: type[Model], *, most_commas: int = _MOST_COMMAS) -> Model:
    try:
        if len(body) <= _MOST_BYTES_ON_THE_LOOP:
            return model.model_validate_json(body, strict=True)
        # Parsing holds the interpreter's lock, so a thread is no help against a body of millions of values, which takes
        # seconds. Commas bound their number; texts that need some of their own are short.
        num_commas = body.count(b",")
        if num_commas > most_commas:
            raise invalid_field("(request)", f"holds about {num_commas} values; at most {most_commas} are read")
        return await asyncio.to_thread(model.model_validate_json, body, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def _search_or_problem(search: SearchRequest | ValidationError, limits: ServingLimits) -> SearchRequest | Problem:
    if isinstance(search, ValidationError):
        return invalid_request(search)
    try:
        require_within_limits(search, limits)
    except Problem as problem:
        return problem
    return search


class _FormParser(MultiPartParser):
    """Takes no form that ends early, of which Starlette would take the whole parts, and leave the last file open."""

    _is_whole = False

    def on_end(self) -> None:
        self._is_whole = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._is_whole:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("it ends before its last boundary")
        return form


async def _read_form(request: Request, limits: ServingLimits, max_files: int) -> _Form:
    """Raises Problem where a name is given twice, or the form cannot be read."""
    parser = _FormParser(request.headers, request.stream(), max_files=max_files, max_fields=_MOST_FORM_FIELDS)
    # Uploads stay in memory: by default Starlette writes what is longer than 1 MiB to a temporary file.
    parser.spool_max_size = limits.max_body_bytes
    try:
        parsed = await parser.parse()
    except MultiPartException as error:
        raise Problem("request.malformed", f"the form cannot be read: {error.message}") from error
    form = _Form()
    try:
        for name, value in parsed.multi_items():
            if name in form.files or name in form.fields:
                raise invalid_field(name, "given twice; each file of a form has a name of its own")
            if isinstance(value, UploadFile):
                form.files[name] = await value.read()
            else:
                form.fields[name] = value
    finally:
        await parsed.close()
    return form


def _search_of_form(form: _Form) -> dict[str, Any]:
    """What the JSON of a search would hold in its place."""
    _require_known_fields(form, SearchForm)
    tree = {name: _search_field(name, text) for name, text in form.fields.items()}
    if "parts" in tree:
        tree["parts"] = _parts_with_files(tree["parts"], form.files)
        return tree
    if "image" not in form.files:
        raise invalid_field("image", "a form needs a picture file under this name, or `parts` that name its files")
    others = [name for name in form.files if name != "image"]
    if others:
        raise invalid_field(others[0], "a file that no part names; several pictures need `parts`")
    return {**tree, "image": form.files["image"]}


def _parts_with_files(parts: Any, files: Mapping[str, bytes]) -> Any:
    """The pictures in place of the names of their files."""
    if not isinstance(parts, list):
        return parts
    complete: list[Any] = []
    named: set[str] = set()
    for place, part in enumerate(parts):
        name = part.get("image") if isinstance(part, dict) else None
        if not isinstance(name, str):
            complete.append(part)
            continue
        if name not in files:
            raise invalid_field(f"parts.{place}.image", "names no file of the form")
        named.add(name)
        complete.append({**part, "image": files[name]})
    unnamed = files.keys() - named
    if unnamed:
        raise invalid_field(min(unnamed), "a file that no part names")
    return complete


def _search_of_numbers(body: bytes, fields: Mapping[str, str]) -> dict[str, Any]:
    for name in fields:
        if name not in ADDRESS_FIELDS:
            raise invalid_field(name, f"there is no such field; beside a vector, {', '.join(ADDRESS_FIELDS)}")
    try:
        vector = numbers_of_bytes(body)
    except ValueError as error:
        raise invalid_field("vector", str(error)) from None
    return {"vector": vector, **{name: _search_field(name, text) for name, text in fields.items()}}


def _search_field(name: str, text: str) -> Any:
    """What the JSON of a search would hold in place of a text of a form or an address."""
    match name:
        case "roi" if text.lstrip().startswith("["):
            return parsed_json(name, text)
        case "roi":
            # One part too many is enough to be refused, whatever else follows.
            return text.split(",", 4)
        case "include":
            return [part.strip() for part in text.split(",", 4)] if text.strip() else []
        case "filter" | "parts":
            return parsed_json(name, text)
        case "rerank" if text.lstrip().startswith("{"):
            return parsed_json(name, text)
    return text


async def _read_item(
    request: Request, limits: ServingLimits, model: type[Model], form_model: type[RequestModel]
) -> Model:
    media_type = _media_type(request)
    match media_type:
        case "application/json":
            return await _read_json(await request.body(), model)
        case "multipart/form-data":
            form = await _read_form(request, limits, max_files=1)
        case _:
            raise _unsupported(media_type, _FORM, _JSON)
    _require_known_fields(form, form_model)
    if form.files.keys() != {"image"}:
        raise invalid_field("image", "a form needs one picture file, under this name")
    tree: dict[str, Any] = {**form.fields, **form.files}
    if "metadata" in tree:
        tree["metadata"] = parsed_json("metadata", tree["metadata"])
    return _checked(model, tree)


def _require_known_fields(form: _Form, model: type[RequestModel]) -> None:
    for name in form.fields:
        if name not in model.model_fields:
            raise invalid_field(name, f"there is no such field; a form has {', '.join(model.model_fields)}")
        if name == "image":
            raise invalid_field(name, "must be a file")
    for name in form.files:
        if name in model.model_fields and name != "image":
            raise invalid_field(name, "must not be a file")
