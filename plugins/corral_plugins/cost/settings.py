"""Run-time settings of the `cost` plugin."""

from __future__ import annotations

from corral.plugin import Setting

REPORTED_PRICES = Setting(
    name="cost.reported_prices",
    kind=bool,
    default=True,
    title="Whether the cost that a provider reports takes precedence over the price table",
)
EVENT_RETENTION_DAYS: Setting[int | None] = Setting(
    name="cost.event_retention_days",
    kind=int,
    default=None,
    minimum=90,
    maximum=3650,
    title="Days for which cost events are kept (unset: forever); totals are always kept",
)
DEFAULT_ATTEMPT_USD = Setting(
    name="cost.default_attempt_usd",
    kind=float,
    default=0.05,
    minimum=0,
    maximum=1000,
    title="Amount in USD that is reserved for an attempt if the costs of the agent's earlier attempts are unknown",
)
UNPRICED_USES = Setting(
    name="cost.unpriced",
    kind=str,
    default="allow",
    choices=("allow", "refuse"),
    title="Whether models without a known price may be used",
)
UPDATE_PRICES = Setting(
    name="cost.update_prices",
    kind=bool,
    default=False,
    title="Whether a newer price table is fetched every day",
)
ALL = (REPORTED_PRICES, EVENT_RETENTION_DAYS, DEFAULT_ATTEMPT_USD, UNPRICED_USES, UPDATE_PRICES)
