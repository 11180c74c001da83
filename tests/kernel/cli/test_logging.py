"""Log lines: one format for servers and workers, and one line a minute of what repeats."""

from __future__ import annotations

import json
import logging
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from corral.cli.logging_setup import MAX_KNOWN_LINES, RepeatedLines

SCRIPT = """
import logging
from corral.cli import logging_setup
logging_setup.configure("info", "auto")
logging.getLogger("corral.worker").warning("task %s: released", 7, extra={"reason": "drain", "duration_ms": 12})
"""


class Lines(logging.Handler):
    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []
        self.addFilter(RepeatedLines(self.handle, now=lambda: now[0]))

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(
            (f"{record.getMessage()} {getattr(record, 'unit', '')}".strip(), getattr(record, "repeated", 0))
        )

    def log(self, message: str, *arguments: Any, level: int = logging.WARNING, **extra: Any) -> None:
        record = logging.LogRecord("corral", level, __file__, 1, message, arguments, None)
        record.__dict__.update(extra)
        self.handle(record)


def test_what_repeats_is_one_line_a_minute_with_a_count() -> None:
    now = [1000.0]
    lines = Lines(now)
    for took in range(200):
        lines.log("slow unit", unit="GET /tasks", duration_ms=took)
        lines.log("slow unit", unit="POST /tasks", duration_ms=took)
    lines.log("task %s: lost", "a")
    lines.log("task %s: lost", "b")
    assert lines.told == [
        ("slow unit GET /tasks", 0),
        ("slow unit POST /tasks", 0),
        ("task a: lost", 0),
        ("task b: lost", 0),
    ]
    now[0] += 60
    lines.log("slow unit", unit="GET /tasks", duration_ms=3)
    lines.log("slow unit", unit="GET /tasks", duration_ms=4)
    assert lines.told[4:] == [("slow unit GET /tasks", 199), ("slow unit POST /tasks", 199)]


def test_the_count_is_told_when_no_equal_line_follows() -> None:
    """By the next line of any kind, and at the end of the process."""
    now = [1000.0]
    lines = Lines(now)
    for _ in range(5):
        lines.log("lost")
    now[0] += 59
    lines.log("request", level=logging.INFO)
    assert lines.told[1:] == [("request", 0)]
    now[0] += 1
    lines.log("request", level=logging.INFO)
    assert lines.told[2:] == [("lost", 4), ("request", 0)]
    script = SCRIPT + 'for _ in range(6):\n    logging.getLogger("corral.x").warning("again")\n'
    told = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True).stderr
    again = [line for line in map(json.loads, told.splitlines()) if line["event"] == "again"]
    assert [line.get("repeated") for line in again] == [None, 5]


def test_the_counts_are_told_when_too_many_lines_are_known() -> None:
    lines = Lines([1000.0])
    for _ in range(3):
        lines.log("lost")
    for number in range(MAX_KNOWN_LINES):
        lines.log("number %s", number)
    assert ("lost", 2) in lines.told


def test_what_is_not_a_warning_is_always_logged_and_memory_is_bounded() -> None:
    now = [1000.0]
    lines = Lines(now)
    for _ in range(3):
        lines.log("request", level=logging.INFO)
    assert len(lines.told) == 3
    for number in range(3 * MAX_KNOWN_LINES):
        now[0] += 1
        lines.log("number %s", number)
    (known,) = lines.filters
    assert isinstance(known, RepeatedLines)
    assert len(known._known) <= MAX_KNOWN_LINES + 1


def test_lines_are_for_people_on_a_terminal_and_json_elsewhere() -> None:
    """Both with the time in UTC, and with the fields of the line."""
    piped = subprocess.run([sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, text=True, check=True).stderr
    line = json.loads(piped)
    assert (line["level"], line["event"], line["reason"], line["duration_ms"]) == (
        "warning",
        "task 7: released",
        "drain",
        12,
    )
    ours, theirs = pty.openpty()
    environ = {"NO_COLOR": "1", "TERM": "xterm", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True, env=environ)
    with open(theirs, "wb"), open(ours, "rb", buffering=0) as screen:
        seen = screen.read(4096).decode()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z \[warning\] +task 7: released .*duration_ms=12 reason=drain\s*", seen
    ), seen


def test_a_slow_unit_below_half_a_second_is_not_logged_during_the_start(caplog: pytest.LogCaptureFixture) -> None:
    from corral.cli.serve import SlowStartFilter

    log, starting = logging.getLogger("corral.database"), SlowStartFilter()
    log.addFilter(starting)
    try:
        for took in (51, 499, 500):
            log.warning("slow unit", extra={"unit": "jobs", "duration_ms": took})
        log.warning("another warning")
    finally:
        log.removeFilter(starting)
    told = [(record.message, getattr(record, "duration_ms", None)) for record in caplog.records]
    assert told == [("slow unit", 500), ("another warning", None)]
