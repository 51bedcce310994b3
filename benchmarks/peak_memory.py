"""How much memory a piece of work takes, for the scripts beside this one."""

import threading
from pathlib import Path


class PeakMemory:
    """Samples this process's anonymous memory every 5 ms; `mib` is how far its peak lay above the start."""

    def __enter__(self) -> "PeakMemory":
        self._start, self.mib, self._is_done = self._anonymous_mib(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_done.wait(0.005):
            self.mib = max(self.mib, self._anonymous_mib() - self._start)

    @staticmethod
    def _anonymous_mib() -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssAnon:")[1].split()[0]) / 1024
