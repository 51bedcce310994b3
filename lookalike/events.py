"""Numbers of a run as JSON lines: one event a line, from which plots and dashboards are fed."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class EventLog:
    """Appends events to a file; the names of values carry their units."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path, event: str) -> list[dict[str, Any]]:
    """All events of one name, oldest first; a last line cut off by a kill is ignored.

    After a resumed run a step can occur twice; the later line is the one that counts.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if tree.get("event") == event:
            found.append(tree)
    return found
