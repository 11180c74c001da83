"""Run-time values of costs."""

from __future__ import annotations

from corral.plugin import Setting

REPORTED_PRICES = Setting(
    name="cost.reported_prices",
    kind=bool,
    default=True,
    title="A cost that a provider reports counts before the price tables",
)
EVENT_RETENTION_DAYS: Setting[int | None] = Setting(
    name="cost.event_retention_days",
    kind=int,
    default=None,
    minimum=90,
    maximum=3650,
    title="Days that cost events are kept (unset: for ever); sums stay",
)
ALL = (REPORTED_PRICES, EVENT_RETENTION_DAYS)
