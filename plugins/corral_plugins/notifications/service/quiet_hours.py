"""Computes when quiet hours end. No function needs a unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from corral import clock
from corral.errors import FieldError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def end_of_quiet_hours(hours: Mapping[str, Any] | None, now: float) -> str | None:
    """Return the end of the quiet hours that include the time `now`, or None if `now` is not in quiet hours.

    Quiet hours from 22:00 to 07:00 belong to the day on which they begin. If `from` and `to` are equal, the quiet hours
    last a day.
    """
    if not hours:
        return None
    zone = ZoneInfo(hours["timezone"])
    local = datetime.fromtimestamp(now, zone)
    start, end = time.fromisoformat(hours["from"]), time.fromisoformat(hours["to"])
    for day in (local.date() - timedelta(days=1), local.date()):
        if DAYS[day.weekday()] not in hours["days"]:
            continue
        begins = datetime.combine(day, start, zone)
        ends = datetime.combine(day if end > start else day + timedelta(days=1), end, zone)
        if begins.astimezone(UTC) <= local.astimezone(UTC) < ends.astimezone(UTC):
            return clock.format_instant(ends.timestamp())
    return None


def quiet_hours_faults(timezone: str, pointer: str) -> list[FieldError]:
    """Return a validation error if the time zone of quiet hours does not exist."""
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return [
            FieldError(
                f"{pointer}/timezone",
                "not_in_enum",
                "There is no time zone of this name; use one such as Europe/Berlin.",
            )
        ]
    return []
