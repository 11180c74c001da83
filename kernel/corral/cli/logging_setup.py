"""Configures logging to standard error, as JSON objects or as human-readable lines.

Each plugin has a rate limit, and a repeated warning is logged at most once a minute.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from corral import clock
from corral.cli.hidden_packages import hide_packages
from corral.redact.redactor import Redactor

with hide_packages("rich"):  # it would print tracebacks with the values of variables, and takes 4 MB
    import structlog

if TYPE_CHECKING:
    from corral.plugins.code_attribution import CodeOwners
    from corral.plugins.discovery import Found

LINES_PER_SECOND = 100
REPEAT_SECONDS, MAX_KNOWN_LINES = 60.0, 1000
RATE_LIMIT_LOGGER = "corral.plugins"


class LogRateLimit(logging.Filter):
    """A filter for log handlers that limits each plugin to `LINES_PER_SECOND` lines per second.

    A line counts towards a plugin's limit if the plugin's code wrote the line or called the code that wrote it, or if
    the line's field `plugin` names the plugin. The filter looks up the installed plugins when it first needs them,
    possibly while they are being imported. The number of dropped lines is logged after `report_seconds`.
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
        """The number of lines dropped since the start of the process, keyed by plugin."""

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
        from corral.plugins.code_attribution import CodeOwners

        return CodeOwners(self._find_plugins())


_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({})))


class LoggedLine(NamedTuple):
    """A logged line: its time, the number of equal lines omitted since then, and the last omitted line."""

    logged_at: float
    left_out: int = 0
    last: logging.LogRecord | None = None


class RepeatedLines(logging.Filter):
    """A log handler filter that lets each repeated warning or error through at most once a minute.

    Lines are equal if they have the same logger, the same message and the same strings in their fields; numbers in
    their fields may differ. When the minute is over, the last omitted line is logged, with the number of omitted lines
    in the field `repeated`. This happens when the next line of any kind is logged, or when the process ends. `log` is
    the function that logs a record.
    """

    def __init__(self, log: Callable[[logging.LogRecord], Any], now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._log, self._now = log, now
        self._lock = threading.Lock()
        self._known: dict[tuple[Any, ...], LoggedLine] = {}
        self._due = math.inf  # when the first minute is over in which lines were left out

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, "repeated"):
            return True
        now = self._now()
        if now >= self._due:
            self.report_omitted(before=now - REPEAT_SECONDS)
        return record.levelno < logging.WARNING or self._is_new(record, now)

    def _is_new(self, record: logging.LogRecord, now: float) -> bool:
        fields = [(name, item) for name, item in vars(record).items() if name not in _STANDARD_FIELDS]
        texts = sorted(item for item in fields if isinstance(item[1], str))
        key = (record.name, record.getMessage(), *texts)
        with self._lock:
            known = self._known.get(key)
            if known is not None and now - known.logged_at < REPEAT_SECONDS:
                self._known[key] = LoggedLine(known.logged_at, known.left_out + 1, record)
                self._due = min(self._due, known.logged_at + REPEAT_SECONDS)
                return False
            is_full = len(self._known) >= MAX_KNOWN_LINES
            if not is_full:
                self._known[key] = LoggedLine(now)
        if is_full:
            self.report_omitted()
            with self._lock:
                self._known = {key: LoggedLine(now)}
        return True

    def report_omitted(self, *, before: float = math.inf) -> None:
        """Report the omitted repetitions of all lines whose current minute began at or before the time `before`."""
        with self._lock:
            over = {key: known for key, known in self._known.items() if known.left_out and known.logged_at <= before}
            now = self._now()
            self._known |= dict.fromkeys(over, LoggedLine(now))
            waiting = [known.logged_at for known in self._known.values() if known.left_out]
            self._due = min(waiting, default=math.inf) + REPEAT_SECONDS
        for known in over.values():
            assert known.last is not None
            known.last.repeated = known.left_out
            self._log(known.last)


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

    `form` is `json`, `console`, or `auto`, which means `console` on a terminal and `json` elsewhere. Times are in UTC.
    If a plugin has disabled any of Corral's loggers, they are enabled again.
    """
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _add_timestamp,
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

    renderer: Any = to_console if form == "console" else _render_json
    if form == "console":
        shared.pop()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    repeated = RepeatedLines(handler.handle)
    handler.addFilter(repeated)
    atexit.register(repeated.report_omitted)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.disable(logging.NOTSET)
    for each in logging.root.manager.loggerDict.values():
        if isinstance(each, logging.Logger) and each.name.partition(".")[0] == "corral":
            each.disabled = False
    for name in quiet:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _add_timestamp(_: Any, __: str, event: Any) -> Any:
    event["ts"] = clock.now()
    return event


def _render_json(_: Any, __: str, event: Any) -> str:
    ordered = {"ts": event.pop("ts"), "level": event.pop("level"), "event": event.pop("event"), **event}
    plain = _redactor.redact_json(msgspec.to_builtins(ordered, enc_hook=str))
    return msgspec.json.encode(plain).decode()
