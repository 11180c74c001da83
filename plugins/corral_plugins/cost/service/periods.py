"""Budget periods, which are calendar months in the budget's time zone."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from corral import clock
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.day_buckets import offset_spans


class Period(NamedTuple):
    """A calendar month in a time zone. `name` has the form `YYYY-MM`.

    The month begins on `first` and ends before `end`.
    """

    name: str
    first: date
    end: date
    zone: ZoneInfo

    @property
    def starts_at(self) -> str:
        """The instant at which the period begins."""
        return _midnight(self.first, self.zone)

    @property
    def ends_at(self) -> str:
        """The instant at which the period ends."""
        return _midnight(self.end, self.zone)

    def cost_micro(self, agent_id: str = "") -> int:
        """Return the costs of one agent in the period in micro-USD, or all costs if no agent is given."""
        spans = offset_spans(self.first, self.end - timedelta(days=1), self.zone)
        return sum(totals.cost_micro for totals in rollups.totals_by_local_day(spans, agent_id=agent_id).values())


def current_period(zone: ZoneInfo) -> Period:
    """Return the current month in a time zone."""
    first = datetime.fromtimestamp(clock.time_s(), zone).date().replace(day=1)
    end = (first + timedelta(days=31)).replace(day=1)
    return Period(f"{first.year:04}-{first.month:02}", first, end, zone)


def _midnight(day: date, zone: ZoneInfo) -> str:
    return clock.format_instant(datetime.combine(day, time(), zone).timestamp())
