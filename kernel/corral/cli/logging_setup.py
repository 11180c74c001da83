"""Logging to standard error, as JSON objects or as human-readable lines, with a rate limit for each plugin."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import structlog

from corral import clock
from corral.plugins.code_owners import CodeOwners
from corral.plugins.record import PluginRecord
from corral.redact.redactor import Redactor

LINES_PER_SECOND = 100
RATE_LIMIT_LOGGER = "corral.plugins"


class LogRateLimit(logging.Filter):
    """A filter for log handlers that limits each plugin to `LINES_PER_SECOND` lines per second.

    A line counts towards the limit of a plugin if the plugin's code wrote the line, or if the line's field `plugin`
    names the plugin.
    """

    def __init__(self, plugins: Iterable[PluginRecord], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._folders = CodeOwners(plugins)
        self._second = 0
        self._lines: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        """The number of lines dropped since the start, by plugin."""

    def filter(self, record: logging.LogRecord) -> bool:
        plugin = self._plugin(record)
        if plugin is None or record.name == RATE_LIMIT_LOGGER:
            return True
        over = None
        with self._lock:
            if int(self._now()) != self._second:
                self._second, over, self._lines = int(self._now()), self._lines, Counter()
            self._lines[plugin] += 1
            allowed = self._lines[plugin] <= LINES_PER_SECOND
            if not allowed:
                self.dropped[plugin] += 1
        for name, lines in (over or {}).items():
            if lines > LINES_PER_SECOND:
                extra = {"plugin": name, "dropped": lines - LINES_PER_SECOND}
                logging.getLogger(RATE_LIMIT_LOGGER).warning("log lines of a plugin dropped", extra=extra)
        return allowed

    def _plugin(self, record: logging.LogRecord) -> str | None:
        about = getattr(record, "plugin", None)
        return str(about) if about in self._folders.names else self._folders.owner(record.pathname)


_redactor = Redactor()  # detects only patterns of credentials; `redact_with` sets one that knows secrets


def redact_with(redactor: Redactor) -> None:
    """Set the redactor that removes credentials from all further log lines of this process."""
    global _redactor
    _redactor = redactor


def limit_log_rate(plugins: Iterable[PluginRecord]) -> LogRateLimit:
    """Limit the rate of each plugin's log lines in all log handlers of this process. Return the added filter."""
    share = LogRateLimit(plugins)
    for handler in logging.getLogger().handlers:
        handler.addFilter(share)
    return share


QUIET = (
    "hypercorn",
    "uvicorn",
    "asyncio",
    "peewee",
    "httpx2",
    "httpcore2",
)  # the last two would log URLs and headers of every call


def configure(level: str, form: str, *, quiet: Iterable[str] = QUIET) -> None:
    """Configure logging with one handler and one formatter. `form` is `json` or `console`.

    Loggers of Corral that a plugin disabled are enabled again.
    """
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _stamp,
        structlog.processors.format_exc_info,
    ]
    # The plain traceback is used because the rich one shows local variables, which may contain secrets.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
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
