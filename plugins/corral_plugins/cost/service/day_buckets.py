"""Converts the days of any time zone to ranges of quarter hours since 1970.

Every UTC offset is a whole number of quarter hours, so the totals of a day in any zone are sums of quarter-hour totals.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from corral import clock
from corral.errors import Invalid

QUARTER_HOUR, DAY = 900, 86_400
QUARTER_HOURS_PER_DAY = DAY // QUARTER_HOUR
FIRST_QUARTER_HOUR = 1_000_000
"""The smallest number that is interpreted as a quarter hour. Smaller numbers are interpreted as days.

Quarter-hour numbers have been larger than this value since 1998, and day numbers will never become as large.
"""
_EPOCH = date(1970, 1, 1)


class OffsetSpan(NamedTuple):
    """A range of quarter hours during which the UTC offset of a time zone does not change.

    The range begins with `first` and ends before `end`. `offset` is the UTC offset in quarter hours.
    """

    first: int
    end: int
    offset: int


def quarter_hour_of(instant: str) -> int:
    """Return the number of the quarter hour that contains an instant, counted from 1970."""
    return int(clock.parse_instant(instant)) // QUARTER_HOUR


def day_of(instant: str) -> int:
    """Return the number of the UTC day that contains an instant, counted from 1970."""
    return int(clock.parse_instant(instant)) // DAY


def month_of(instant: str) -> int:
    """Return the number of the UTC month that contains an instant, counted from the year 0."""
    return int(instant[:4]) * 12 + int(instant[5:7]) - 1


def day_number(day: date) -> int:
    """Return the number of days from 1970-01-01 to a date."""
    return (day - _EPOCH).days


def date_of(number: int) -> date:
    """Return the date that corresponds to a day number."""
    return _EPOCH + timedelta(days=number)


def parse_zone(name: str) -> ZoneInfo:
    """Return the time zone with this IANA name. Raise `Invalid` with the pointer `/query/tz` if the name is unknown."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise Invalid.at("/query/tz", "bad_format", "Give an IANA time zone, such as Europe/Berlin.") from None


def current_day(tz: ZoneInfo) -> date:
    """Return the current date in a time zone."""
    return datetime.fromtimestamp(clock.time_s(), tz).date()


def offset_spans(first: date, last: date, tz: ZoneInfo) -> list[OffsetSpan]:
    """Divide the days from `first` to `last` into ranges within which the UTC offset is constant.

    There are few ranges, because the offset rarely changes more than twice a year.
    """
    return list(_split_span(_midnight_of(first, tz), _midnight_of(last + timedelta(days=1), tz), tz))


def _split_span(begin: int, end: int, tz: ZoneInfo) -> Iterator[OffsetSpan]:
    while begin < end:
        offset, step = _utc_offset(begin, tz), begin
        while step < end and _utc_offset(step, tz) == offset:
            step += QUARTER_HOURS_PER_DAY
        until = min(step, end)
        if step < end or _utc_offset(end - 1, tz) != offset:
            until = _offset_change(max(begin, step - QUARTER_HOURS_PER_DAY), min(step, end), offset, tz)
        yield OffsetSpan(begin, until, offset)
        begin = until


def _offset_change(low: int, high: int, offset: int, tz: ZoneInfo) -> int:
    """Find the first quarter hour after `low` whose UTC offset is not `offset`, using a binary search.

    Return `high` if there is no such quarter hour before it.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _utc_offset(middle, tz) == offset else (low, middle)
    return high


def _midnight_of(day: date, tz: ZoneInfo) -> int:
    return int(datetime.combine(day, time(), tz).timestamp()) // QUARTER_HOUR


@functools.lru_cache(maxsize=4096)
def _utc_offset(quarter_hour: int, tz: ZoneInfo) -> int:
    offset = datetime.fromtimestamp(quarter_hour * QUARTER_HOUR, UTC).astimezone(tz).utcoffset()
    return int(offset.total_seconds()) // QUARTER_HOUR if offset is not None else 0
