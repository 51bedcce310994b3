"""`lookalike search`, in an index on this machine or on a server."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from indexing.commands.options import AsJson
from lookalike.console import print_result
from lookalike.errors import SettingsError

if TYPE_CHECKING:
    from indexing.reranking.settings import RerankSettings
    from lookalike.filters import Filter
    from lookalike.records import SearchParameters


def search(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="[INDEX] PICTURE", help="Index folder, unless --url; pictures to search with."),
    ],
    url: Annotated[
        str | None, typer.Option(help="Search on a running server, such as http://127.0.0.1:8000/, with no INDEX.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="API key, for servers that want one.", envvar="LOOKALIKE_API_KEY", show_envvar=True),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Number of answers per picture.")] = 10,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector.")] = False,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Find this share of the exact nearest, such as 0.95; without it, what the index is built for."
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help='Only pictures whose metadata fit: "class_name = cat and width >= 200"; or a filter in JSON.'
        ),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(help="Look at the first hits again: a method's name, such as k_reciprocal, or its settings."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(help="Search this version, one that `lookalike index versions` lists, and not the current one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the nearest pictures of an index, best first."""
    if exact and recall is not None:
        raise SettingsError("--recall has no effect beside --exact, which finds everything. Leave one of them out.")
    if recall is not None and not 0 < recall <= 1:
        raise SettingsError(f"--recall must be above 0 and at most 1, found {recall}.")
    condition = None if where is None else read_filter(where)
    method = None if rerank is None else read_rerank(rerank)
    from lookalike.records import SearchParameters

    parameters = SearchParameters(k=k, exact=exact, recall=recall, filter=condition)
    if url is not None:
        folder = next((path for path in paths if path.is_dir()), None)
        if folder is not None:
            raise SettingsError(f"--url takes no INDEX: {folder} is a folder. Give pictures alone, or leave --url out.")
        from indexing.remote_search import search_on_server

        answers = search_on_server(url, paths, parameters, rerank_by=method, version=version, api_key=key)
    else:
        index, *pictures = paths
        if not pictures:
            raise SettingsError(f"nothing to search with: give pictures after the index {index}, or --url.")
        answers = _search_here(index, pictures, parameters, method, version)
    print_result({"answers": answers}, as_json=as_json, lines=lambda: list(_lines(answers)))


def _search_here(
    index: Path,
    pictures: Sequence[Path],
    parameters: "SearchParameters",
    method: "RerankSettings | None",
    version: str | None,
) -> list[dict[str, Any]]:
    from indexing.living.live_index import LiveIndex
    from indexing.picture_search import search_with_pictures

    live_index = LiveIndex.open(index)
    try:
        view = live_index.view() if version is None else live_index.open_version(version)
        return search_with_pictures(view, pictures, parameters, rerank_by=method)
    finally:
        live_index.close()


def read_filter(text: str) -> "Filter":
    """A filter as it is typed, or in JSON.

    Raises:
        SettingsError: it is neither; the message says where it goes wrong.
    """
    import json

    from lookalike.filter_text import parse_filter_text
    from lookalike.filters import parse_filter

    try:
        return parse_filter(json.loads(text)) if text.lstrip().startswith("{") else parse_filter_text(text)
    except (ValueError, RecursionError) as error:  # json's own error is a ValueError, too
        raise SettingsError(f"--where {text!r}: {error}. For example: class_name = cat and width >= 200") from error


def read_rerank(text: str) -> "RerankSettings":
    """A method by its name, or by its settings in JSON.

    Raises:
        SettingsError: it is neither.
    """
    import json

    from indexing.reranking.settings import parse_rerank

    try:
        return parse_rerank(json.loads(text) if text.lstrip().startswith("{") else text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--rerank {text!r} is neither a name nor JSON: {error}.") from error


def _lines(answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    for answer in answers:
        yield f"{answer['picture']}:"
        for position, hit in enumerate(answer["hits"], start=1):
            name = hit.get("key", hit["id"])
            yield f"{position:>4}  {hit['score']:.4f}  {name}  {hit.get('class_name') or ''}".rstrip()
        if not answer["hits"]:
            yield "      nothing fits"
