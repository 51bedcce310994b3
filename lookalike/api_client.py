"""A typed client of a running server's HTTP API, blocking (`ApiClient`) or for asyncio (`AsyncApiClient`).

Both take their requests, their patience and the reading of answers from the functions below, and differ only in how
they wait. Fields of answers are described in the server's OpenAPI document; those that a newer server adds are ignored.
Imports no torch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar

import httpx2
import numpy as np
import tenacity
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError

from lookalike.errors import ResourceError
from lookalike.settings import Settings

_ASK_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_NOBODY_LISTENS = (httpx2.ConnectError, httpx2.ConnectTimeout)
_FIRST_PAUSE_SECONDS = 0.5
_NUM_SHOWN_CHARACTERS = 100

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
Numbers = Float[ndarray, "numbers"] | Sequence[int | float]


class ApiClientSettings(Settings):
    """How patient a client is."""

    timeout_seconds: PositiveFloat = 30.0
    """Longest wait for a connection, and for the next piece of an answer."""
    num_attempts: Annotated[int, Field(ge=1)] = 4
    """How often a request is sent while nobody listens, or the server answers 429 or 503."""
    longest_pause_seconds: PositiveFloat = 10.0
    """Between two attempts; a server that asks for a longer pause (Retry-After) is not asked again."""


_DEFAULTS = ApiClientSettings()


class ApiProblem(ResourceError):
    """The server's own refusal of a request (RFC 9457)."""

    def __init__(self, message: str, *, status: int, code: str, detail: str, fix: str, request_id: str) -> None:
        super().__init__(message)
        self.status = status  # of HTTP
        self.code = code  # stable: branch on it; a newer server may have more of them
        self.detail = detail  # what was wrong
        self.fix = fix  # what to do next
        self.request_id = request_id  # as in the server's log


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """What the index finds at one number of probes, measured when it was built."""

    num_probes: int
    recall_at_10: float
    milliseconds_per_query: float


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one request."""

    max_body_bytes: int
    max_k: int
    max_items: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What is served, by what."""

    index_version: str
    index_fingerprint: str
    index_type: str
    encoder_fingerprint: str
    num_vectors: int
    dim: int
    default_num_probes: int
    recall_curve: tuple[RecallPoint, ...]
    has_pictures: bool
    limits: ServerLimits
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of the gallery."""

    id: int
    key: str
    class_name: str | None
    width: int  # in pixels
    height: int  # in pixels
    image_url: str | None  # without scheme and host; None where the server has no pictures


@dataclass(frozen=True, slots=True)
class Hit(Item):
    """A picture of the gallery that a query found."""

    score: float  # cosine similarity to the query


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """What a query found, best first; equal scores are ordered by id."""

    request_id: str
    index_version: str
    encoder_fingerprint: str
    timings_ms: dict[str, float]  # stage -> milliseconds; `queue` is the waiting, `total` is everything
    hits: tuple[Hit, ...]


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
        settings: ApiClientSettings = _DEFAULTS,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            url: Where the server's page is, such as http://127.0.0.1:8000/.
            transport: Carries requests in place of a network connection.

        Raises:
            ValueError: `url` is not the address of a server.
        """
        self._url, self._settings = _checked_url(url), settings
        self._http = httpx2.Client(base_url=self._url, timeout=settings.timeout_seconds, transport=transport)

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def info(self) -> ServerInfo:
        """What is served, by what, within which limits."""
        return self._answer(_info())

    def search(
        self,
        image: bytes | None = None,
        *,
        id: int | None = None,
        vector: Numbers | None = None,
        roi: Numbers | None = None,
        k: int = 10,
        exact: bool = False,
        include_self: bool = False,
    ) -> SearchAnswer:
        """The nearest pictures to exactly one of `image`, `id` and `vector`.

        Args:
            image: A picture file.
            id: A picture of the index, itself left out of the hits unless `include_self`.
            vector: An embedding made by the index's encoder; the server scales it to unit length.
            roi: With `image`: left, top, right and bottom in pixels of the upright picture; the rest is not looked at.
            k: Most hits; fewer come where the gallery is smaller.
            exact: Compare with every vector, whatever the index.

        Raises:
            ValueError: none or several are given, or numbers are not finite.
        """
        return self._answer(_search(image, id, vector, roi, k=k, exact=exact, include_self=include_self))

    def item(self, id: int) -> Item:
        """One picture of the gallery."""
        return self._answer(_item(id))

    def items(self, sample: int = 24, seed: int | None = None) -> tuple[Item, ...]:
        """Random pictures of the gallery, all different, the same for the same seed; fewer where it is smaller."""
        return self._answer(_items(sample, seed))

    def item_image(self, id: int) -> bytes:
        """The original file of a picture."""
        return self._answer(_item_image(id))

    def is_ready(self) -> bool:
        """Whether the server takes queries now, asked once; also False where nobody listens."""
        try:
            return self._answer(_readiness())
        except _NobodyListens:
            return False

    def _answer(self, call: "_Call[Value]") -> Value:
        def send() -> httpx2.Response:
            return self._http.request(call.method, call.path, **call.content)

        with _failures_named(self._url, self._settings):
            response = tenacity.Retrying(**_patience(self._settings, call))(send)
        return call.read(response)


class AsyncApiClient:
    """`ApiClient` for asyncio: the same methods, to be awaited; may be shared by the tasks of one event loop."""

    def __init__(
        self,
        url: str,
        *,
        settings: ApiClientSettings = _DEFAULTS,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """See `ApiClient`."""
        self._url, self._settings = _checked_url(url), settings
        self._http = httpx2.AsyncClient(base_url=self._url, timeout=settings.timeout_seconds, transport=transport)

    async def __aenter__(self) -> "AsyncApiClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def info(self) -> ServerInfo:
        """See `ApiClient.info`."""
        return await self._answer(_info())

    async def search(
        self,
        image: bytes | None = None,
        *,
        id: int | None = None,
        vector: Numbers | None = None,
        roi: Numbers | None = None,
        k: int = 10,
        exact: bool = False,
        include_self: bool = False,
    ) -> SearchAnswer:
        """See `ApiClient.search`."""
        return await self._answer(_search(image, id, vector, roi, k=k, exact=exact, include_self=include_self))

    async def item(self, id: int) -> Item:
        """See `ApiClient.item`."""
        return await self._answer(_item(id))

    async def items(self, sample: int = 24, seed: int | None = None) -> tuple[Item, ...]:
        """See `ApiClient.items`."""
        return await self._answer(_items(sample, seed))

    async def item_image(self, id: int) -> bytes:
        """See `ApiClient.item_image`."""
        return await self._answer(_item_image(id))

    async def is_ready(self) -> bool:
        """See `ApiClient.is_ready`."""
        try:
            return await self._answer(_readiness())
        except _NobodyListens:
            return False

    async def _answer(self, call: "_Call[Value]") -> Value:
        async def send() -> httpx2.Response:
            return await self._http.request(call.method, call.path, **call.content)

        with _failures_named(self._url, self._settings):
            # Its own for each call: tasks that shared one would mix up their attempts.
            response: httpx2.Response = await tenacity.AsyncRetrying(**_patience(self._settings, call))(send)
        return call.read(response)


@dataclass(frozen=True, slots=True)
class _Call(Generic[Value]):
    """One question: how it is asked, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx2.Response], Value]
    content: Mapping[str, Any] = field(default_factory=dict)  # arguments of httpx2's `request`
    is_asked_again: bool = True


@dataclass(frozen=True, slots=True)
class _Items:
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class _ProblemDetails:
    status: int
    detail: str
    code: str
    fix: str
    request_id: str


class _NobodyListens(ResourceError):
    pass


def _info() -> _Call[ServerInfo]:
    return _Call("GET", "v1/info", lambda response: _value(response, ServerInfo))


def _search(
    image: bytes | None,
    id: int | None,
    vector: Numbers | None,
    roi: Numbers | None,
    *,
    k: int,
    exact: bool,
    include_self: bool,
) -> _Call[SearchAnswer]:
    given = [name for name, query in (("image", image), ("id", id), ("vector", vector)) if query is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of image, id and vector; found {' and '.join(given) or 'none'}")
    fields: dict[str, Any] = {"k": k, "exact": exact}
    if include_self:
        if id is None:
            raise ValueError("include_self has a meaning only with id")
        fields["include_self"] = True
    if roi is not None:
        if image is None:
            raise ValueError("roi has a meaning only with image")
        fields["roi"] = ",".join(map(repr, _finite_numbers(roi, name="roi")))
    if image is not None:
        content: dict[str, Any] = {"files": {"image": ("image", image)}, "data": fields}
    elif vector is not None:
        content = {"json": {**fields, "vector": _finite_numbers(vector, name="vector")}}
    else:
        content = {"json": {**fields, "id": id}}
    return _Call("POST", "v1/search", lambda response: _value(response, SearchAnswer), content)


def _item(id: int) -> _Call[Item]:
    return _Call("GET", f"v1/items/{int(id)}", lambda response: _value(response, Item))


def _items(sample: int, seed: int | None) -> _Call[tuple[Item, ...]]:
    params = {"sample": sample} if seed is None else {"sample": sample, "seed": seed}
    return _Call("GET", "v1/items", lambda response: _value(response, _Items).items, {"params": params})


def _item_image(id: int) -> _Call[bytes]:
    return _Call("GET", f"v1/items/{int(id)}/image", _picture)


def _readiness() -> _Call[bool]:
    return _Call("GET", "readyz", _is_ready, is_asked_again=False)


def _finite_numbers(values: Numbers, *, name: str) -> list[float]:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, found an array of shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return numbers.tolist()


def _checked_url(url: str) -> str:
    with suppress(httpx2.InvalidURL):
        parsed = httpx2.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return url
    raise ValueError(f"{url!r} is not the address of a server: give one such as http://127.0.0.1:8000/")


def _patience(settings: ApiClientSettings, call: _Call[Value]) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`: the last response or error is what a call ends in."""

    def is_to_be_asked_again(state: tenacity.RetryCallState) -> bool:
        error, response = _outcome(state)
        if response is None:
            return isinstance(error, _NOBODY_LISTENS)
        wish = _wished_pause_seconds(response)
        return response.status_code in _ASK_AGAIN and (wish is None or wish <= settings.longest_pause_seconds)

    def pause_seconds(state: tenacity.RetryCallState) -> float:
        _, response = _outcome(state)
        wish = None if response is None else _wished_pause_seconds(response)
        return wish if wish is not None else own_pause(state)

    own_pause = tenacity.wait_random_exponential(_FIRST_PAUSE_SECONDS, settings.longest_pause_seconds)
    return {
        "stop": tenacity.stop_after_attempt(settings.num_attempts if call.is_asked_again else 1),
        "retry": is_to_be_asked_again,
        "wait": pause_seconds,
        "before_sleep": tenacity.before_sleep_log(logger, logging.INFO),
        "retry_error_callback": lambda state: state.outcome.result(),
    }


def _outcome(state: tenacity.RetryCallState) -> tuple[BaseException | None, httpx2.Response | None]:
    """Of one attempt: its error or its response."""
    assert state.outcome is not None
    error = state.outcome.exception()
    return error, None if error else state.outcome.result()


def _wished_pause_seconds(response: httpx2.Response) -> float | None:
    """What Retry-After says, in seconds or as a date; None where it is absent or says neither."""
    wish = response.headers.get("retry-after", "").strip()
    if wish.isdecimal():
        return float(wish)
    try:
        return max(0.0, (parsedate_to_datetime(wish) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return None


@contextmanager
def _failures_named(url: str, settings: ApiClientSettings) -> Iterator[None]:
    try:
        yield
    except _NOBODY_LISTENS as error:
        raise _NobodyListens(
            f"no server answers at {url}: {_text_of(error)}. Start one with `lookalike serve`, or check the address."
        ) from error
    except httpx2.TimeoutException as error:
        raise ResourceError(
            f"{url} gave no answer within {settings.timeout_seconds:g} seconds. Try again, or raise timeout_seconds."
        ) from error
    except httpx2.RequestError as error:
        raise ResourceError(f"the exchange with {url} broke off: {_text_of(error)}. Try again.") from error


def _value(response: httpx2.Response, kind: type[Value]) -> Value:
    _require_success(response)
    try:
        # mypy does not know that types are hashable.
        return _reader(kind)(response.content)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _foreign_answer(response, error) from error


def _picture(response: httpx2.Response) -> bytes:
    _require_success(response)
    if not response.headers.get("content-type", "").startswith(("image/", "application/octet-stream")):
        raise _foreign_answer(response)
    return response.content


def _is_ready(response: httpx2.Response) -> bool:
    if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    _require_success(response)
    return True


def _require_success(response: httpx2.Response) -> None:
    if response.status_code == HTTPStatus.OK:
        return
    try:
        problem = _reader(_ProblemDetails)(response.content)
    except ValidationError as error:
        raise _foreign_answer(response, error) from error
    raise ApiProblem(
        f"{response.url} answered {problem.status} {problem.code}: {problem.detail}. {problem.fix} "
        f"(request {problem.request_id})",
        **asdict(problem),
    )


def _foreign_answer(response: httpx2.Response, error: ValidationError | None = None) -> ResourceError:
    """What came in place of an answer that this client reads."""
    kind = response.headers.get("content-type", "no content type")
    found = f"{kind} that starts with {response.text[:_NUM_SHOWN_CHARACTERS]!r}"
    first = error.errors()[0] if error else None
    if first is not None and first["type"] != "json_invalid":
        found = f"JSON of another kind ({'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg']})"
    return ResourceError(
        f"{response.url} answered {response.status_code} with {found}. Check that a Lookalike server is there, none "
        "older than this client."
    )


@cache
def _reader(kind: Any) -> Callable[[bytes], Any]:
    return TypeAdapter(kind).validate_json


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__
