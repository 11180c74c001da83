"""The clock. Rows, events and JSON store instants as strings `YYYY-MM-DDTHH:MM:SS.mmmZ` (UTC).

Because of their fixed width, instants sort as text on both database engines, so they need no conversion when they are
read (docs/adr/0003).
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
    """Return the seconds since the epoch, shifted by `travel`."""
    return time.time() + _shift


def format_instant(seconds: float) -> str:
    """Format epoch seconds as an instant, clamped to the range from `FIRST` to `LAST`."""
    if not _FIRST_SECOND <= seconds < _LAST_SECOND + 0.999:
        return FIRST if seconds < 0 else LAST
    second = math.floor(seconds)
    micros = round((seconds - second) * 1_000_000)
    if micros == 1_000_000:
        second, micros = second + 1, 0
    return f"{_format_whole_second(second)}.{micros // 1000:03d}Z"


@functools.lru_cache(maxsize=64)
def _format_whole_second(second: int) -> str:
    """Format whole epoch seconds as an instant without the milliseconds and the `Z`.

    The results are cached, because a process formats many instants of the same second.
    """
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")[:-6]


def now(after_seconds: float = 0.0) -> str:
    """Return the current time, shifted by `after_seconds`, as an instant."""
    return format_instant(time.time() + _shift + after_seconds)


def parse_instant(instant: str) -> float:
    """Convert an instant to epoch seconds."""
    return datetime.fromisoformat(instant).timestamp()


def from_datetime(moment: datetime) -> str:
    """Convert an aware datetime of any time zone to an instant, clamped to the range from `FIRST` to `LAST`."""
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        return FIRST if moment.year == 1 else LAST
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def elapsed_ms(since: str, until: str) -> int:
    """Return the milliseconds from `since` to `until`, or 0 if `until` is earlier."""
    return max(0, round((parse_instant(until) - parse_instant(since)) * 1000))


def travel(seconds: float) -> None:
    """Shift the clock of this process by `seconds`. For tests."""
    global _shift
    _shift += seconds


def reset() -> None:
    """Undo all calls of `travel`."""
    global _shift
    _shift = 0.0
