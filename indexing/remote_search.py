"""Picture files -> hits of a running server: what `lookalike search --url` prints. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from indexing.reranking.settings import RerankSettings
from lookalike.api_answers import Hit
from lookalike.api_client import ApiClient
from lookalike.errors import DataError, SettingsError
from lookalike.filters import to_tree
from lookalike.records import SearchParameters


def search_on_server(
    url: str,
    pictures: Sequence[Path],
    parameters: SearchParameters,
    *,
    rerank_by: RerankSettings | None = None,
    version: str | None = None,
    api_key: str | None = None,
) -> list[dict[str, Any]]:
    """As `search_with_pictures` of an index on this machine.

    Raises:
        SettingsError: `url` is no address.
        DataError: a file cannot be read; the message names it.
        ResourceError: the server does not answer, or refuses a search.
    """
    try:
        connected = ApiClient(url, api_key=api_key)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error
    condition = None if parameters.filter is None else to_tree(parameters.filter)
    method = None if rerank_by is None else rerank_by.model_dump()
    answers = []
    with connected as client:
        for picture in pictures:
            answer = client.search(
                _bytes_of(picture),
                k=parameters.k,
                exact=parameters.exact,
                recall=parameters.recall,
                filter=condition,
                rerank=method,
                include=("metadata",),
                version=version,
            )
            answers.append({"picture": str(picture), "hits": [_entry(hit) for hit in answer.hits]})
    return answers


def _entry(hit: Hit) -> dict[str, Any]:
    columns = {"key": hit.key, "class_name": hit.class_name, "width": hit.width, "height": hit.height}
    known = {name: value for name, value in columns.items() if value is not None}
    return {"id": hit.id, "score": round(hit.score, 6), **known, **hit.metadata}


def _bytes_of(picture: Path) -> bytes:
    try:
        return picture.read_bytes()
    except OSError as error:
        raise DataError(f"{picture} cannot be read: {error.strerror}.") from error
