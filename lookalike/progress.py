"""Progress of long work: a bar on a terminal, a plain line every so often elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_SECONDS_TO_FIRST_LINE = 3.0
_SECONDS_BETWEEN_LINES = 15.0

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Progress:
    """Counts done work and shows done/total, rate and time left; a context manager."""

    def __init__(self, total: int, *, description: str, unit: str, done: int = 0, is_shown: bool = True) -> None:
        has_bar = is_shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=description, unit=f" {unit}", disable=not has_bar, leave=False)
        self._prints_lines = is_shown and not has_bar
        self._total, self._done, self._description, self._unit = total, done, description, unit
        self._started, self._at_start = time.monotonic(), done
        self._next_line = self._started + _SECONDS_TO_FIRST_LINE

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._prints_lines and now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            rate = (self._done - self._at_start) / (now - self._started)
            left = duration((self._total - self._done) / rate) if rate > 0 else "?"
            logger.info(
                "%s: %d/%d %s, %.1f/s, %s left%s",
                self._description,
                self._done,
                self._total,
                self._unit,
                rate,
                left,
                f", {note}" if note else "",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Iterable[Item], *, total: int, description: str, unit: str) -> Iterator[Item]:
    """Yields `items` and shows how far it is."""
    with Progress(total, description=description, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
