"""Rankings of a running server, asked for over its HTTP API with the benchmark's own query pictures."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Generic, TypeVar

from lookalike.api_answers import Hit, Item, ServerInfo
from lookalike.api_client import ApiClient, ApiProblem
from lookalike.errors import ManifestMismatch, ResourceError, SettingsError
from lookalike.progress import Progress

_NUM_SAMPLED = 200

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class PictureQuery:
    """A picture to search with, read when its turn comes."""

    name: str
    read: Callable[[], bytes]
    roi: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels of the upright picture


@dataclass(frozen=True, slots=True)
class ServerRankings(Generic[Kept]):
    """What one index version of one server answered to every query."""

    info: ServerInfo
    answers: list[Kept]  # what was kept of each list of hits
    sampled_keys: tuple[str, ...]  # of random pictures of the server's gallery that have one
    k: int  # hits asked for
    is_exact: bool
    warnings: tuple[str, ...] = ()


@contextmanager
def connected(url: str, *, api_key: str | None = None) -> Iterator[ApiClient]:
    """A client of the server, until the block ends.

    Raises:
        SettingsError: `url` is no address.
        ResourceError: from the block; where the server wants a key, it says how one is given.
    """
    try:
        client = ApiClient(url, api_key=api_key)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error
    try:
        with client:
            yield client
    except ApiProblem as problem:
        if problem.status != HTTPStatus.UNAUTHORIZED:
            raise
        what = "wants an API key" if api_key is None else "does not know the API key that it was given"
        raise ResourceError(
            f"{url} {what}: {problem.detail}. Give one with --key, or in the environment variable LOOKALIKE_API_KEY; "
            "the server's operator makes keys with `lookalike serve keys add`."
        ) from problem


def served_items(url: str, *, api_key: str | None = None) -> Iterator[Item]:
    """Every picture of the server's gallery, in ascending order of ids.

    Raises:
        SettingsError, ResourceError: as of `connected`, or the server does not answer.
    """
    with connected(url, api_key=api_key) as client:
        info = client.info()
        after_id = None
        with Progress(info.num_vectors, description="pictures of the server", unit="pictures") as progress:
            while True:
                page = client.items(after_id=after_id, limit=info.limits.max_items)
                yield from page.items
                progress.advance(len(page.items))
                after_id = page.next_after_id
                if after_id is None:
                    return


def ask_server(
    url: str,
    queries: Sequence[PictureQuery],
    keep: Callable[[tuple[Hit, ...]], Kept],
    *,
    k: int,
    exact: bool,
    num_connections: int = 4,
    api_key: str | None = None,
) -> ServerRankings[Kept]:
    """Sends every query, several at a time, and keeps the order.

    Args:
        keep: What is kept of a query's hits; all hits of all queries would take gigabytes.
        k: Hits wanted; the server's own limit may be lower.
        exact: Let the server compare with every vector.
        api_key: For servers that want one.

    Raises:
        SettingsError: `url` is no address.
        ResourceError: the server does not answer, or refuses a query.
        ManifestMismatch: the index was swapped in between, so that the answers do not belong together.
    """
    with (
        connected(url, api_key=api_key) as client,
        Progress(len(queries), description="searching", unit="queries") as progress,
    ):
        info = client.info()
        asked = min(k, info.limits.max_k)

        def ask(query: PictureQuery) -> Kept:
            answer = client.search(query.read(), roi=query.roi, k=asked, exact=exact)
            if (answer.index_version, answer.encoder_fingerprint) != (info.index_version, info.encoder_fingerprint):
                raise ManifestMismatch(
                    f"{url} answered {query.name} from index version {answer.index_version}, earlier queries from "
                    f"{info.index_version}: it was swapped meanwhile. Run the evaluation again."
                )
            return keep(answer.hits)

        answers = []
        with ThreadPoolExecutor(num_connections) as pool:
            futures = [pool.submit(ask, query) for query in queries]
            try:
                for future in futures:
                    answers.append(future.result())
                    progress.advance(1)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        items = client.random_items(min(_NUM_SAMPLED, info.limits.max_items), seed=0)
    sampled_keys = tuple(item.key for item in items if item.key is not None)
    needed = min(k, info.num_vectors)
    warnings: tuple[str, ...] = ()
    if asked < needed:
        warnings = (
            f"The server gives at most {asked:,} hits, {needed:,} were wanted: metrics that need them are only "
            "bounded. Its setting limits.max_k raises that.",
        )
    return ServerRankings(info, answers, sampled_keys, asked, exact, warnings)
