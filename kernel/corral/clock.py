"""The one clock. Instants are strings `YYYY-MM-DDTHH:MM:SS.mmmZ` (UTC) everywhere: in rows, events and JSON.

The fixed width makes them sort as text on every engine, so no read has to convert them (docs/adr/0003).
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
    """Seconds since the epoch, moved by `travel`."""
    return time.time() + _shift


def format_instant(seconds: float) -> str:
    """Epoch seconds as an instant; `FIRST` or `LAST` for what lies beyond them."""
    if not _FIRST_SECOND <= seconds < _LAST_SECOND + 0.999:
        return FIRST if seconds < 0 else LAST
    second = math.floor(seconds)
    micros = round((seconds - second) * 1_000_000)
    if micros == 1_000_000:
        second, micros = second + 1, 0
    return f"{_until_second(second)}.{micros // 1000:03d}Z"


@functools.lru_cache(maxsize=64)
def _until_second(second: int) -> str:
    """All but the fraction: most instants of a process lie in the present second or a few others."""
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")[:-6]


def now(after_seconds: float = 0.0) -> str:
    """The present instant, or the one `after_seconds` from now (negative: ago)."""
    return format_instant(time.time() + _shift + after_seconds)


def parse_instant(instant: str) -> float:
    """Epoch seconds of an instant."""
    return datetime.fromisoformat(instant).timestamp()


def from_datetime(moment: datetime) -> str:
    """An aware datetime (any offset) as an instant; `FIRST` or `LAST` where UTC has no year for it."""
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        return FIRST if moment.year == 1 else LAST
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def elapsed_ms(since: str, until: str) -> int:
    """Milliseconds between two instants, never negative."""
    return max(0, round((parse_instant(until) - parse_instant(since)) * 1000))


def travel(seconds: float) -> None:
    """Move the clock of this process; tests only."""
    global _shift
    _shift += seconds


def reset() -> None:
    """Undo every `travel`."""
    global _shift
    _shift = 0.0
