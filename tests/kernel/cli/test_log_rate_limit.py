"""A plugin may write 100 lines a second; what it writes beyond that is counted and told of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from corral.cli.logging_setup import LINES_PER_SECOND, LogRateLimit
from corral.plugin import Plugin
from corral.plugins.discovery import Found
from corral.plugins.record import PluginRecord
from corral_plugins.tasks.plugin import TasksPlugin


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record)


def record(path: str, name: str = "anything", **extra: object) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, path, 1, "a line", (), None)
    made.__dict__.update(extra)
    return made


def loaded(kind: type[Plugin]) -> PluginRecord:
    return PluginRecord(found=Found(name=kind.name, load=lambda: kind), kind=kind)


def test_a_flood_is_cut_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    share, lines = LogRateLimit([loaded(TasksPlugin)], now=lambda: now[0]), Lines()
    lines.addFilter(share)
    path = str(
        Path(__import__("corral_plugins.tasks.plugin", fromlist=["x"]).__file__).parent / "service" / "claims.py"
    )
    for _ in range(250):
        lines.handle(record(path))
        lines.handle(record(__file__))
    for _ in range(10):
        lines.handle(record(__file__, plugin="tasks"))  # lines about it count as well
    assert sum(each.pathname == path for each in lines.told) == LINES_PER_SECOND
    assert sum(each.pathname == __file__ for each in lines.told) == 250
    assert share.dropped == {"tasks": 160}
    now[0] += 1
    with caplog.at_level(logging.WARNING, logger="corral.plugins"):
        lines.handle(record(path))
    assert lines.told[-1].pathname == path
    assert [(each.plugin, each.dropped) for each in caplog.records] == [("tasks", 160)]  # type: ignore[attr-defined]
