"""Long work on several ranks: none waits in a collective for longer than a heartbeat."""

import threading
from collections.abc import Callable

import torch

from lookalike.collectives import any_rank
from lookalike.errors import LookalikeError
from lookalike.world import World

_SECONDS_BETWEEN_BEATS = 1.0


class OtherRankFailed(LookalikeError):
    """Another process could not do its part; its own message says why."""


def work_together(work: Callable[[], None], world: World) -> None:
    """Calls `work` on this rank and returns once all ranks are done with theirs.

    Work may take hours on one rank and nothing on another: a plain barrier would time out, so ranks tell each other
    every second that they are alive.

    Raises:
        OtherRankFailed: work raised on another rank; on that rank the error itself is raised.
    """
    if world.size == 1:
        work()
        return
    errors: list[BaseException] = []
    # Not an executor: its threads would keep an interrupted program alive until they are done.
    thread = threading.Thread(target=_record_errors, args=(work, errors), daemon=True)
    thread.start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_any_busy = True
    while is_any_busy:
        thread.join(_SECONDS_BETWEEN_BEATS)
        # Asked once: the thread may end between two looks, and then this rank would leave without the others.
        is_busy = thread.is_alive()
        is_any_busy = any_rank(is_busy, world, device=device)
        if any_rank(not is_busy and bool(errors), world, device=device):
            if errors:
                raise errors[0]
            raise OtherRankFailed("Another process failed; its own message says why. Run the same command again.")


def first_works(work: Callable[[], None], world: World) -> None:
    """Like `work_together`, where only the first rank has something to do."""
    work_together(work if world.is_first else _nothing, world)


def _nothing() -> None:
    pass


def _record_errors(work: Callable[[], None], errors: list[BaseException]) -> None:
    try:
        work()
    except BaseException as error:
        errors.append(error)
