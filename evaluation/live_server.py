"""Rankings of a running server, asked for over its HTTP API with the benchmark's own query pictures."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lookalike.api_client import ApiClient, Hit, SearchAnswer, ServerInfo
from lookalike.errors import ManifestMismatch
from lookalike.progress import Progress


@dataclass(frozen=True, slots=True)
class PictureQuery:
    """A picture to search with, read when its turn comes."""

    name: str
    read: Callable[[], bytes]
    roi: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels of the upright picture


@dataclass(frozen=True, slots=True)
class ServerRankings:
    """What one index version of one server answered to every query."""

    info: ServerInfo
    hits: list[tuple[Hit, ...]]  # best first, per query
    k: int  # hits asked for
    is_exact: bool


def ask_server(
    url: str, queries: Sequence[PictureQuery], *, k: int, exact: bool, num_connections: int = 4
) -> ServerRankings:
    """Sends every query, several at a time, and keeps the order.

    Args:
        k: Hits wanted; the server's own limit may be lower.
        exact: Let the server compare with every vector.

    Raises:
        ResourceError: the server does not answer, or refuses a query.
        ManifestMismatch: the index was swapped in between, so that the answers do not belong together.
    """
    with ApiClient(url) as client, Progress(len(queries), description="searching", unit="queries") as progress:
        info = client.info()
        asked = min(k, info.limits.max_k)

        def ask(query: PictureQuery) -> SearchAnswer:
            return client.search(query.read(), roi=query.roi, k=asked, exact=exact)

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
    for query, answer in zip(queries, answers, strict=True):
        if (answer.index_version, answer.encoder_fingerprint) != (info.index_version, info.encoder_fingerprint):
            raise ManifestMismatch(
                f"{url} answered {query.name} from index version {answer.index_version}, earlier queries from "
                f"{info.index_version}: it was swapped meanwhile. Run the evaluation again."
            )
    return ServerRankings(info, [answer.hits for answer in answers], asked, exact)
