"""Run-time settings of cost accounting."""

from __future__ import annotations

from corral.plugin import Setting

REPORTED_PRICES = Setting(
    name="cost.reported_prices",
    kind=bool,
    default=True,
    title="Use the cost that a provider reports instead of the price table",
)
EVENT_RETENTION_DAYS: Setting[int | None] = Setting(
    name="cost.event_retention_days",
    kind=int,
    default=None,
    minimum=90,
    maximum=3650,
    title="Days for which cost events are kept (unset: forever); totals are always kept",
)
ALL = (REPORTED_PRICES, EVENT_RETENTION_DAYS)
