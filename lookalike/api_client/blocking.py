"""The client whose methods return when the answer is there."""

from collections.abc import Sequence
from typing import TypeVar

import httpx2
import tenacity

from lookalike.api_answers import IndexVersions, Item, ItemPage, SearchAnswer, ServerInfo
from lookalike.api_client import calls
from lookalike.api_client.calls import PictureSize
from lookalike.api_client.exchange import (
    DEFAULTS,
    ApiClientSettings,
    ApiProblem,
    Call,
    NobodyListensError,
    checked_url,
    failures_named,
    headers_with,
    patience,
)
from lookalike.api_client.queries import Extra, JsonObject, Numbers, QueryPart, SearchQuery

Value = TypeVar("Value")


class ApiClient:
    """Asks one server; a context manager, whose connections are kept between requests and may be shared by threads.

    Its methods raise:
        ApiProblem: the server refused the request.
        ResourceError: nobody listens, the answer is late or cut off, or what answers is no such server.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        settings: ApiClientSettings = DEFAULTS,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            url: Where the server's page is, such as http://127.0.0.1:8000/.
            api_key: For servers that want one.
            transport: Carries requests in place of a network connection.

        Raises:
            ValueError: `url` is not the address of a server.
        """
        self._url, self._settings = checked_url(url), settings
        self._http = httpx2.Client(
            base_url=self._url, timeout=settings.timeout_seconds, transport=transport, headers=headers_with(api_key)
        )

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def info(self) -> ServerInfo:
        """What is served, by what, within which limits."""
        return self._answer(calls.info())

    def search(
        self,
        image: bytes | None = None,
        *,
        url: str | None = None,
        id: int | None = None,
        vector: Numbers | None = None,
        roi: Numbers | None = None,
        parts: Sequence[QueryPart] | None = None,
        k: int = 10,
        exact: bool = False,
        recall: float | None = None,
        filter: JsonObject | None = None,
        rerank: str | JsonObject | None = None,
        include_self: bool = False,
        include: Sequence[Extra] | None = None,
        version: str | None = None,
    ) -> SearchAnswer:
        """The nearest pictures to exactly one of `image`, `url`, `id`, `vector` and `parts`.

        Args:
            image: A picture file.
            url: Where a picture is, for servers that fetch some.
            id: A picture of the index, itself left out of the hits unless `include_self`.
            vector: An embedding made by the index's encoder; the server scales it to unit length.
            roi: With `image` or `url`: left, top, right and bottom in pixels of the upright picture; the rest is not
                looked at.
            parts: Several of these; searched by is the sum of their unit vectors, each times its weight.
            k: Most hits; fewer come where the gallery is smaller.
            exact: Compare with every vector, whatever the index.
            recall: Search as hard as finds this share of the exact nearest.
            filter: Find only pictures whose metadata fit this condition, as `lookalike.filters` reads it.
            rerank: A second look at the first hits: a method's name, or its settings with that `name`.
            include: What the answer tells beside ids and scores; None: metadata and timings.
            version: Of the index, which need not serve and does not change over; None: the one that serves. While it is
                being opened, the server is asked again, at most `num_attempts` times.

        Raises:
            ValueError: none or several are given, or numbers are not finite.
        """
        query = SearchQuery(
            image, url, id, vector, roi, parts, k, exact, recall, filter, rerank, include_self, include, version
        )
        return self._answer(calls.search(query))

    def search_batch(self, queries: Sequence[SearchQuery]) -> tuple[SearchAnswer | ApiProblem, ...]:
        """Several searches in one request: for each its answer, or why it was refused."""
        return self._answer(calls.search_batch(queries))

    def item(self, id: int) -> Item:
        """One picture of the gallery."""
        return self._answer(calls.item(id))

    def items(
        self, *, after_id: int | None = None, limit: int | None = None, filter: JsonObject | None = None
    ) -> ItemPage:
        """Pictures of the gallery in ascending order of ids: those above `after_id` whose metadata fit."""
        return self._answer(calls.items(after_id, limit, filter))

    def random_items(self, count: int = 24, seed: int | None = None) -> tuple[Item, ...]:
        """Random pictures of the gallery, all different, the same for the same seed; fewer where it is smaller."""
        return self._answer(calls.random_items(count, seed)).items

    def add(
        self,
        image: bytes | None = None,
        *,
        vector: Numbers | None = None,
        metadata: JsonObject | None = None,
        id: int | None = None,
        replace: bool = False,
    ) -> Item:
        """Adds a picture, or a vector alone; it is on the server's disk when this returns.

        Args:
            metadata: Values for some of the index's columns.
            id: Not in use, unless `replace`; None: the next one.
            replace: Take the place of what has this id, if anything has.

        Raises:
            ValueError: not exactly one of `image` and `vector` is given.
        """
        return self._answer(calls.add(image, vector, metadata, id, replace))

    def replace(
        self,
        id: int,
        image: bytes | None = None,
        *,
        vector: Numbers | None = None,
        metadata: JsonObject | None = None,
    ) -> Item:
        """Puts another picture or vector in the place of one; `metadata` that are None stay as they are."""
        return self._answer(calls.replace(id, image, vector, metadata))

    def delete(self, id: int) -> None:
        """Takes a picture out."""
        self._answer(calls.delete(id))

    def item_image(self, id: int, size: PictureSize = "original") -> bytes:
        """The file of a picture, or a small JPEG of it."""
        return self._answer(calls.item_image(id, size))

    def versions(self) -> IndexVersions:
        """The versions of the index, and which of them searches use."""
        return self._answer(calls.versions())

    def swap(self, version: str) -> str:
        """Changes over to a version; returns once it serves, its name."""
        return self._answer(calls.swap(version))

    def rollback(self) -> str:
        """Changes over to the version before the current one, and returns its name."""
        return self._answer(calls.rollback())

    def compact(self) -> str:
        """Makes a version that holds all changes, changes over to it, and returns its name; as slow as a build."""
        return self._answer(calls.compact())

    def is_ready(self) -> bool:
        """Whether the server takes queries now, asked once; also False where nobody listens."""
        try:
            return self._answer(calls.readiness())
        except NobodyListensError:
            return False

    def _answer(self, call: Call[Value]) -> Value:
        def send() -> httpx2.Response:
            return self._http.request(call.method, call.path, **call.content)

        with failures_named(self._url, self._settings):
            response = tenacity.Retrying(**patience(self._settings, call))(send)
        return call.read(response)
