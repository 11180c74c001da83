"""The clock. Rows, events and JSON represent instants as strings of the form `YYYY-MM-DDTHH:MM:SS.mmmZ` (UTC).

Because of their fixed width, instants sort as text on both database engines, so they need no conversion when they are
read (docs/adr/0003).
"""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime

FIRST, LAST = "0001-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z"
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799

STEP_SECONDS, MAX_STEP_SECONDS = 1.0, 86_400.0  # the system clock was set back by a time within this range
CATCH_UP = 0.05  # by which this clock then runs slower, until the system clock has caught up with it
_shift = 0.0
_anchor = (0.0, 0.0)  # a monotonic time, and the difference between this clock and the monotonic time at that moment


def time_s() -> float:
    """Return the seconds since the epoch, shifted by `travel`.

    If the system clock is set back, this clock keeps running, so that leases, delays and tokens expire on time. It runs
    5 % slower until the system clock has caught up. If the system clock is set back by more than a day, this clock
    follows it.
    """
    global _anchor
    monotonic = time.monotonic()
    offset, system = _anchor[1] - (monotonic - _anchor[0]) * CATCH_UP, time.time() - monotonic
    if not STEP_SECONDS < offset - system < MAX_STEP_SECONDS:
        _anchor, offset = (monotonic, system), system
    return monotonic + offset + _shift


def system_time_s() -> float:
    """Return the time of the system clock, for protocols such as TOTP that compare it with another device's clock."""
    return time.time() + _shift


def continue_from(instant: str) -> None:
    """Make the clock continue from an instant stored in the database, if it is later than the system time.

    The clock then behaves as if the system clock had just been set back.
    """
    global _anchor
    if (seconds := parse_instant(instant) - _shift) > time_s() - _shift:
        _anchor = (time.monotonic(), seconds - time.monotonic())


def format_instant(seconds: float) -> str:
    """Format epoch seconds as an instant, clamped to the years 1 to 9999."""
    if not _FIRST_SECOND <= seconds < _LAST_SECOND + 0.999:
        return FIRST if seconds < 0 else LAST
    second, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{_format_whole_second(second)}.{micros // 1000:03d}Z"


@functools.lru_cache(maxsize=64)
def _format_whole_second(second: int) -> str:
    """Format whole epoch seconds as an instant without the milliseconds and the `Z`.

    The results are cached, because a process formats many instants of the same second.
    """
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")[:-6]


def now(after_seconds: float = 0.0) -> str:
    """Return the current time, shifted by `after_seconds`, as an instant."""
    return format_instant(time_s() + after_seconds)


def parse_instant(instant: str) -> float:
    """Convert an instant to epoch seconds."""
    return datetime.fromisoformat(instant).timestamp()


def from_datetime(moment: datetime) -> str:
    """Convert a timezone-aware datetime to an instant, clamped to the years 1 to 9999."""
    return format_instant(moment.timestamp())


def elapsed_ms(since: str, until: str) -> int:
    """Return the milliseconds from `since` to `until`, or 0 if `until` is earlier."""
    return max(0, round((parse_instant(until) - parse_instant(since)) * 1000))


def travel(seconds: float) -> None:
    """Shift the clock of this process by `seconds`. Only tests call this function."""
    global _shift
    _shift += seconds


def reset() -> None:
    """Undo all calls to `travel`, and set this clock to the system clock."""
    global _shift, _anchor
    _shift, _anchor = 0.0, (0.0, 0.0)
