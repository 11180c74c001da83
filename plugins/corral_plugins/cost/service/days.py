"""Days in a time zone, as the sums see them: quarters of an hour since 1970. Every zone's offset is whole quarters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from corral import clock
from corral.errors import Invalid

QUARTER, DAY = 900, 86_400
QUARTERS_A_DAY = DAY // QUARTER
FIRST_QUARTER = 1_000_000
"""Quarters are greater than this since 1998, and numbers of days will never be."""
_EPOCH = date(1970, 1, 1)


class Stretch(NamedTuple):
    """Quarters from `first` until before `end`, all at one offset from UTC (in quarters)."""

    first: int
    end: int
    offset: int


def quarter_of(instant: str) -> int:
    """The quarter of an hour in which an instant lies."""
    return int(clock.parse_instant(instant)) // QUARTER


def day_of(instant: str) -> int:
    """The UTC day of an instant, as a number."""
    return int(clock.parse_instant(instant)) // DAY


def number_of(day: date) -> int:
    """A day as a number: days since 1970."""
    return (day - _EPOCH).days


def date_of(number: int) -> date:
    """The day of a number."""
    return _EPOCH + timedelta(days=number)


def zone(name: str) -> ZoneInfo:
    """A time zone by its IANA name; `Invalid` at `/query/tz`."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise Invalid.at("/query/tz", "bad_format", "Give an IANA time zone, such as Europe/Berlin.") from None


def today(where: ZoneInfo) -> date:
    """The present day there."""
    return datetime.fromtimestamp(clock.time_s(), where).date()


def stretches(first: date, last: date, where: ZoneInfo) -> list[Stretch]:
    """The days from `first` to `last`, cut where the clocks change: rarely more than three pieces a year."""
    return list(_cut(_midnight(first, where), _midnight(last + timedelta(days=1), where), where))


def _cut(begin: int, end: int, where: ZoneInfo) -> Iterator[Stretch]:
    while begin < end:
        offset, step = _offset(begin, where), begin
        while step < end and _offset(step, where) == offset:
            step += QUARTERS_A_DAY
        until = min(step, end)
        if step < end or _offset(end - 1, where) != offset:
            until = _change(max(begin, step - QUARTERS_A_DAY), min(step, end), offset, where)
        yield Stretch(begin, until, offset)
        begin = until


def _change(low: int, high: int, offset: int, where: ZoneInfo) -> int:
    """The first quarter after `low`, at most `high`, whose offset is another one."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _offset(middle, where) == offset else (low, middle)
    return high


def _midnight(day: date, where: ZoneInfo) -> int:
    return int(datetime.combine(day, time(), where).timestamp()) // QUARTER


@functools.lru_cache(maxsize=4096)
def _offset(quarter: int, where: ZoneInfo) -> int:
    shift = datetime.fromtimestamp(quarter * QUARTER, UTC).astimezone(where).utcoffset()
    return int(shift.total_seconds()) // QUARTER if shift is not None else 0
