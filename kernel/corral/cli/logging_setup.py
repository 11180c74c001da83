"""Logging to standard error, as JSON objects or as human-readable lines.

Each plugin has a rate limit, and a warning that repeats is logged once a minute.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from corral import clock
from corral.redact.redactor import Redactor

if TYPE_CHECKING:
    from corral.plugins.code_owners import CodeOwners
    from corral.plugins.discovery import Found

LINES_PER_SECOND = 100
REPEAT_SECONDS, MAX_KNOWN_LINES = 60.0, 1000
RATE_LIMIT_LOGGER = "corral.plugins"


class LogRateLimit(logging.Filter):
    """A filter for log handlers that limits each plugin to `LINES_PER_SECOND` lines per second.

    A line counts towards the limit of a plugin if the plugin's code wrote the line or called the code that wrote it, or
    if the line's field `plugin` names the plugin. `find_plugins` is called when the filter first needs the plugins,
    which may be while they are being imported. The number of dropped lines is logged after `report_seconds`.
    """

    def __init__(
        self,
        find_plugins: Callable[[], Iterable[Found]],
        now: Callable[[], float] = time.monotonic,
        report_seconds: float = 1.0,
    ) -> None:
        super().__init__()
        self._find_plugins, self._now, self._report_seconds = find_plugins, now, report_seconds
        self._lock = threading.Lock()
        self._second = 0
        self._lines: Counter[str] = Counter()
        self._unreported: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        """The number of lines dropped since the start, by plugin."""

    def filter(self, record: logging.LogRecord) -> bool:
        plugin = None if record.name == RATE_LIMIT_LOGGER else self._plugin(record)
        if plugin is None:
            return True
        with self._lock:
            if int(self._now()) != self._second:
                self._second, self._lines = int(self._now()), Counter()
            self._lines[plugin] += 1
            if self._lines[plugin] <= LINES_PER_SECOND:
                return True
            if not self._unreported:
                report = threading.Timer(self._report_seconds, self._report)
                report.daemon = True
                report.start()
            self._unreported[plugin] += 1
            self.dropped[plugin] += 1
        return False

    def _report(self) -> None:
        with self._lock:
            unreported, self._unreported = self._unreported, Counter()
        for plugin, lines in unreported.items():
            extra = {"plugin": plugin, "dropped": lines}
            logging.getLogger(RATE_LIMIT_LOGGER).warning("log lines of a plugin dropped", extra=extra)

    def _plugin(self, record: logging.LogRecord) -> str | None:
        about = getattr(record, "plugin", None)
        if about in self._owners.names:
            return str(about)
        found = self._owners.owner(record.pathname)
        frame = sys._getframe()
        while found is None and (caller := frame.f_back) is not None:
            frame = caller
            found = self._owners.owner(frame.f_code.co_filename)
        return found

    @cached_property
    def _owners(self) -> CodeOwners:
        from corral.plugins.code_owners import CodeOwners

        return CodeOwners(self._find_plugins())


_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({})))


class RepeatedLines(logging.Filter):
    """A filter for log handlers that logs a repeating warning or error at most once a minute.

    Lines are equal if they have the same logger, message and texts in their fields; measured numbers may differ. The
    next line after the minute has the field `repeated`, the number of lines that were left out before it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], tuple[float, int]] = {}  # when the line was logged, and how many were not

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        fields = [(name, item) for name, item in vars(record).items() if name not in _STANDARD_FIELDS]
        texts = sorted(item for item in fields if isinstance(item[1], str))
        key = (record.name, record.getMessage(), *texts)
        with self._lock:
            now = self._now()
            logged_at, left_out = self._known.get(key, (now - REPEAT_SECONDS, 0))
            if now - logged_at < REPEAT_SECONDS:
                self._known[key] = (logged_at, left_out + 1)
                return False
            if len(self._known) >= MAX_KNOWN_LINES:
                self._known.clear()
            self._known[key] = (now, 0)
        if left_out:
            record.repeated = left_out
        return True


_redactor = Redactor()  # detects only patterns of credentials; `redact_with` sets one that knows secrets


def redact_with(redactor: Redactor) -> None:
    """Set the redactor that removes credentials from all further log lines of this process."""
    global _redactor
    _redactor = redactor


def limit_log_rate(limit: LogRateLimit) -> None:
    """Limit the rate of each plugin's log lines in all log handlers of this process."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(limit)


QUIET = (
    "hypercorn",
    "uvicorn",
    "asyncio",
    "peewee",
    "httpx2",
    "httpcore2",
)  # the last two would log URLs and headers of every call


def configure(level: str, form: str, *, quiet: Iterable[str] = QUIET) -> None:
    """Configure logging with one handler and one formatter.

    `form` is `json`, `console`, or `auto`, which is `console` on a terminal and `json` elsewhere. Times are in UTC.
    Corral's loggers that a plugin disabled are enabled again.
    """
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _stamp,
        structlog.processors.format_exc_info,
    ]
    # The plain traceback is used because the rich one shows local variables, which may contain secrets.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
        exception_formatter=structlog.dev.plain_traceback,
        timestamp_key="ts",
        pad_event_to=0,
        pad_level=False,
    )

    def to_console(logger: Any, name: str, event: Any) -> str:
        return _redactor.redact(str(console(logger, name, event)))

    renderer: Any = to_console if form == "console" else _json
    if form == "console":
        shared.pop()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(RepeatedLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.disable(logging.NOTSET)
    for each in logging.root.manager.loggerDict.values():
        if isinstance(each, logging.Logger) and each.name.partition(".")[0] == "corral":
            each.disabled = False
    for name in quiet:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _stamp(_: Any, __: str, event: Any) -> Any:
    event["ts"] = clock.now()
    return event


def _json(_: Any, __: str, event: Any) -> str:
    ordered = {"ts": event.pop("ts"), "level": event.pop("level"), "event": event.pop("event"), **event}
    plain = _redactor.redact_json(msgspec.to_builtins(ordered, enc_hook=str))
    return msgspec.json.encode(plain).decode()
