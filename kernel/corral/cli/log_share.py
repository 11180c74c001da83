"""At most 100 log lines a second of one plugin; the rest is counted and told of in one line."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from corral.plugins.code_owners import CodeOwners
from corral.plugins.record import PluginRecord

LINES_A_SECOND = 100
TOLD_BY = "corral.plugins"


class LogShare(logging.Filter):
    """For the handlers of a process. A line is a plugin's when its code wrote it, or when it is about the plugin."""

    def __init__(self, plugins: Iterable[PluginRecord], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._folders = CodeOwners(plugins)
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
        return str(about) if about in self._folders.names else self._folders.owner(record.pathname)
