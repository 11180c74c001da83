"""At most 100 log lines a second of one plugin; the rest is counted and told of in one line."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from corral.loader import Loaded

LINES_A_SECOND = 100
TOLD_BY = "corral.isolation"


class LogShare(logging.Filter):
    """For the handlers of a process. A line is a plugin's when its code wrote it, or when it is about the plugin."""

    def __init__(self, plugins: Iterable[Loaded], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._folders = {
            str(Path(inspect.getfile(item.kind)).parent) + os.sep: item.name
            for item in plugins
            if item.kind is not None and item.name != "core"
        }
        self._names = frozenset(self._folders.values())
        self._files: dict[str, str | None] = {}
        self._second = 0
        self._lines: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        """Lines since the start, by plugin."""

    def filter(self, record: logging.LogRecord) -> bool:
        plugin = self._plugin(record)
        if plugin is None or record.name == TOLD_BY:
            return True
        over = None
        with self._lock:
            if int(self._now()) != self._second:
                self._second, over, self._lines = int(self._now()), self._lines, Counter()
            self._lines[plugin] += 1
            allowed = self._lines[plugin] <= LINES_A_SECOND
            if not allowed:
                self.dropped[plugin] += 1
        for name, lines in (over or {}).items():
            if lines > LINES_A_SECOND:
                told = {"plugin": name, "left_out": lines - LINES_A_SECOND}
                logging.getLogger(TOLD_BY).warning("a plugin floods the log", extra=told)
        return allowed

    def _plugin(self, record: logging.LogRecord) -> str | None:
        about = getattr(record, "plugin", None)
        if about in self._names:
            return str(about)
        path = record.pathname
        if path not in self._files:
            self._files[path] = next((name for folder, name in self._folders.items() if path.startswith(folder)), None)
        return self._files[path]
