"""Logging of a process: one JSON object a line on standard error, or readable lines for a console."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import msgspec
import structlog

from corral import clock
from corral.cli.log_share import LogShare
from corral.plugins.record import PluginRecord
from corral.redact.redactor import Redactor

_redactor = Redactor()  # knows what credentials look like, until `redact_with` names one that knows them


def redact_with(redactor: Redactor) -> None:
    """From now on take this process' credentials out of every line."""
    global _redactor
    _redactor = redactor


def share_among(plugins: Iterable[PluginRecord]) -> LogShare:
    """From now on no plugin has more than its share of the lines."""
    share = LogShare(plugins)
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
)  # the last two tell URLs and headers of every call


def configure(level: str, form: str, *, quiet: Iterable[str] = QUIET) -> None:
    """Send all logs through one formatter, also those that a plugin switched off. `form`: json | console."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _stamp,
        structlog.processors.format_exc_info,
    ]
    # A plain traceback: the rich one shows local variables, and so secrets.
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
