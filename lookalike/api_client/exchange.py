"""How often a server is asked, what is made of its answers, and what of their absence."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar

import httpx2
import tenacity
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError

from lookalike.api_answers import SearchAnswer
from lookalike.errors import ResourceError
from lookalike.settings import Settings

_ASK_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_SUCCESS = (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT)
_NOBODY_LISTENS = (httpx2.ConnectError, httpx2.ConnectTimeout)
_FIRST_PAUSE_SECONDS = 0.5
_NUM_SHOWN_CHARACTERS = 100

logger = logging.getLogger("lookalike.api_client")
Value = TypeVar("Value")


class ApiClientSettings(Settings):
    """How patient a client is."""

    timeout_seconds: PositiveFloat = 30.0
    """Longest wait for a connection, and for the next piece of an answer."""
    num_attempts: Annotated[int, Field(ge=1)] = 4
    """How often a request is sent while nobody listens, or the server answers 429 or 503."""
    longest_pause_seconds: PositiveFloat = 10.0
    """Between two attempts; a server that asks for a longer pause (Retry-After) is not asked again."""


DEFAULTS = ApiClientSettings()


class ApiProblem(ResourceError):
    """The server's own refusal of a request (RFC 9457)."""

    def __init__(self, message: str, *, status: int, code: str, detail: str, fix: str, request_id: str) -> None:
        super().__init__(message)
        self.status = status  # of HTTP
        self.code = code  # stable: branch on it; a newer server may have more of them
        self.detail = detail  # what was wrong
        self.fix = fix  # what to do next
        self.request_id = request_id  # as in the server's log


class NobodyListensError(ResourceError):
    """Nothing answers at the address."""


@dataclass(frozen=True, slots=True)
class Call(Generic[Value]):
    """One question: how it is asked, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx2.Response], Value]
    content: Mapping[str, Any] = field(default_factory=dict)  # arguments of httpx2's `request`
    is_asked_again: bool = True
    is_change: bool = False  # of the server's state


@dataclass(frozen=True, slots=True)
class _ProblemDetails:
    status: int
    detail: str
    code: str
    fix: str
    request_id: str


@dataclass(frozen=True, slots=True)
class _BatchResult:
    answer: SearchAnswer | None = None
    problem: _ProblemDetails | None = None


@dataclass(frozen=True, slots=True)
class _BatchAnswer:
    results: tuple[_BatchResult, ...]


@dataclass(frozen=True, slots=True)
class _Current:
    current: str


def checked_url(url: str) -> str:
    with suppress(httpx2.InvalidURL):
        parsed = httpx2.URL(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return url
    raise ValueError(f"{url!r} is not the address of a server: give one such as http://127.0.0.1:8000/")


def headers_with(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def patience(settings: ApiClientSettings, call: Call[Value]) -> dict[str, Any]:
    """Arguments of tenacity's `Retrying` and `AsyncRetrying`: the last response or error is what a call ends in."""

    def is_to_be_asked_again(state: tenacity.RetryCallState) -> bool:
        error, response = _outcome(state)
        if response is None:
            return isinstance(error, _NOBODY_LISTENS)
        # The server's own refusal says that nothing was begun; a proxy's may come after the server did what was asked.
        if call.is_change and not _is_problem(response):
            return False
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


def _is_problem(response: httpx2.Response) -> bool:
    return bool(response.headers.get("content-type", "").startswith("application/problem+json"))


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
def failures_named(url: str, settings: ApiClientSettings) -> Iterator[None]:
    try:
        yield
    except _NOBODY_LISTENS as error:
        raise NobodyListensError(
            f"no server answers at {url}: {_text_of(error)}. Start one with `lookalike serve`, or check the address."
        ) from error
    except httpx2.TimeoutException as error:
        raise ResourceError(
            f"{url} gave no answer within {settings.timeout_seconds:g} seconds. Try again, or raise timeout_seconds."
        ) from error
    except httpx2.RequestError as error:
        raise ResourceError(f"the exchange with {url} broke off: {_text_of(error)}. Try again.") from error


def value_reader(kind: type[Value]) -> Callable[[httpx2.Response], Value]:
    """Reads answers that are JSON of this kind."""
    return lambda response: _value(response, kind)


def batch_results(response: httpx2.Response) -> tuple[SearchAnswer | ApiProblem, ...]:
    """What became of each search of a batch."""
    results: list[SearchAnswer | ApiProblem] = []
    for result in _value(response, _BatchAnswer).results:
        if result.answer is not None:
            results.append(result.answer)
        elif result.problem is not None:
            results.append(_problem(result.problem, response))
        else:
            raise _foreign_answer(response)
    return tuple(results)


def current_version(response: httpx2.Response) -> str:
    return _value(response, _Current).current


def no_value(response: httpx2.Response) -> None:
    _require_success(response)


def _value(response: httpx2.Response, kind: type[Value]) -> Value:
    _require_success(response)
    try:
        # mypy does not know that types are hashable.
        return _reader(kind)(response.content)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _foreign_answer(response, error) from error


def picture(response: httpx2.Response) -> bytes:
    _require_success(response)
    if not response.headers.get("content-type", "").startswith(("image/", "application/octet-stream")):
        raise _foreign_answer(response)
    return response.content


def is_ready(response: httpx2.Response) -> bool:
    if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        return False
    _require_success(response)
    return True


def _require_success(response: httpx2.Response) -> None:
    if response.status_code in _SUCCESS:
        return
    try:
        problem = _reader(_ProblemDetails)(response.content)
    except ValidationError as error:
        raise _foreign_answer(response, error) from error
    raise _problem(problem, response)


def _problem(problem: _ProblemDetails, response: httpx2.Response) -> ApiProblem:
    return ApiProblem(
        f"{response.url} answered {problem.status} {problem.code}: {problem.detail.removesuffix('.')}. {problem.fix} "
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
