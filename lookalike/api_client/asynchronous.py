"""The client whose methods are to be awaited."""

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


class AsyncApiClient:
    """`ApiClient` for asyncio: the same methods, to be awaited; may be shared by the tasks of one event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        settings: ApiClientSettings = DEFAULTS,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """See `ApiClient`."""
        self._url, self._settings = checked_url(url), settings
        self._http = httpx2.AsyncClient(
            base_url=self._url, timeout=settings.timeout_seconds, transport=transport, headers=headers_with(api_key)
        )

    async def __aenter__(self) -> "AsyncApiClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def info(self) -> ServerInfo:
        """See `ApiClient.info`."""
        return await self._answer(calls.info())

    async def search(
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
        """See `ApiClient.search`."""
        query = SearchQuery(
            image, url, id, vector, roi, parts, k, exact, recall, filter, rerank, include_self, include, version
        )
        return await self._answer(calls.search(query))

    async def search_batch(self, queries: Sequence[SearchQuery]) -> tuple[SearchAnswer | ApiProblem, ...]:
        """See `ApiClient.search_batch`."""
        return await self._answer(calls.search_batch(queries))

    async def item(self, id: int) -> Item:
        """See `ApiClient.item`."""
        return await self._answer(calls.item(id))

    async def items(
        self, *, after_id: int | None = None, limit: int | None = None, filter: JsonObject | None = None
    ) -> ItemPage:
        """See `ApiClient.items`."""
        return await self._answer(calls.items(after_id, limit, filter))

    async def random_items(self, count: int = 24, seed: int | None = None) -> tuple[Item, ...]:
        """See `ApiClient.random_items`."""
        return (await self._answer(calls.random_items(count, seed))).items

    async def add(
        self,
        image: bytes | None = None,
        *,
        vector: Numbers | None = None,
        metadata: JsonObject | None = None,
        id: int | None = None,
        replace: bool = False,
    ) -> Item:
        """See `ApiClient.add`."""
        return await self._answer(calls.add(image, vector, metadata, id, replace))

    async def replace(
        self,
        id: int,
        image: bytes | None = None,
        *,
        vector: Numbers | None = None,
        metadata: JsonObject | None = None,
    ) -> Item:
        """See `ApiClient.replace`."""
        return await self._answer(calls.replace(id, image, vector, metadata))

    async def delete(self, id: int) -> None:
        """See `ApiClient.delete`."""
        await self._answer(calls.delete(id))

    async def item_image(self, id: int, size: PictureSize = "original") -> bytes:
        """See `ApiClient.item_image`."""
        return await self._answer(calls.item_image(id, size))

    async def versions(self) -> IndexVersions:
        """See `ApiClient.versions`."""
        return await self._answer(calls.versions())

    async def swap(self, version: str) -> str:
        """See `ApiClient.swap`."""
        return await self._answer(calls.swap(version))

    async def rollback(self) -> str:
        """See `ApiClient.rollback`."""
        return await self._answer(calls.rollback())

    async def compact(self) -> str:
        """See `ApiClient.compact`."""
        return await self._answer(calls.compact())

    async def is_ready(self) -> bool:
        """See `ApiClient.is_ready`."""
        try:
            return await self._answer(calls.readiness())
        except NobodyListensError:
            return False

    async def _answer(self, call: Call[Value]) -> Value:
        async def send() -> httpx2.Response:
            return await self._http.request(call.method, call.path, **call.content)

        with failures_named(self._url, self._settings):
            # Its own for each call: tasks that shared one would mix up their attempts.
            response: httpx2.Response = await tenacity.AsyncRetrying(**patience(self._settings, call))(send)
        return call.read(response)
