"""The clock. Instants are strings `YYYY-MM-DDTHH:MM:SS.mmmZ` (UTC) in rows, events and JSON.

Their fixed width makes them sort as text on both engines, so reading needs no conversion (docs/adr/0003).
"""

from __future__ import annotations

import functools
import math
import time
from datetime import UTC, datetime

FIRST, LAST = "0001-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z"
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799

_shift = 0.0


def time_s() -> float:
    """Seconds since the epoch, shifted by `travel`."""
    return time.time() + _shift


def format_instant(seconds: float) -> str:
    """Epoch seconds as an instant, limited to `FIRST` and `LAST`."""
    if not _FIRST_SECOND <= seconds < _LAST_SECOND + 0.999:
        return FIRST if seconds < 0 else LAST
    second = math.floor(seconds)
    micros = round((seconds - second) * 1_000_000)
    if micros == 1_000_000:
        second, micros = second + 1, 0
    return f"{_whole_second(second)}.{micros // 1000:03d}Z"


@functools.lru_cache(maxsize=64)
def _whole_second(second: int) -> str:
    """The instant up to its second. Cached, because most instants of a process share a few seconds."""
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")[:-6]


def now(after_seconds: float = 0.0) -> str:
    """The current instant, plus `after_seconds`."""
    return format_instant(time.time() + _shift + after_seconds)


def parse_instant(instant: str) -> float:
    """Epoch seconds of an instant."""
    return datetime.fromisoformat(instant).timestamp()


def from_datetime(moment: datetime) -> str:
    """An aware datetime with any offset as an instant, limited to `FIRST` and `LAST`."""
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        return FIRST if moment.year == 1 else LAST
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def elapsed_ms(since: str, until: str) -> int:
    """Milliseconds between two instants, at least 0."""
    return max(0, round((parse_instant(until) - parse_instant(since)) * 1000))


def travel(seconds: float) -> None:
    """Shift the clock of this process. For tests."""
    global _shift
    _shift += seconds


def reset() -> None:
    """Undo every `travel`."""
    global _shift
    _shift = 0.0
