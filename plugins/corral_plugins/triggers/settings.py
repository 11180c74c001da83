"""Settings of the `triggers` plugin."""

from __future__ import annotations

from corral.plugin import Setting

MAX_FAILURES = Setting(
    name="triggers.max_failures",
    kind=int,
    default=5,
    minimum=1,
    maximum=100,
    title="Number of consecutive failures of its action after which a trigger is disabled",
)
HISTORY_DAYS = Setting(
    name="triggers.history_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=365,
    title="Days for which the history of triggers is kept",
)
MIN_INTERVAL_SECONDS = Setting(
    name="triggers.min_interval_seconds",
    kind=int,
    default=10,
    minimum=10,
    maximum=3600,
    title="Minimum interval between two scheduled times of a trigger, in seconds",
)
MAX_PER_USER = Setting(
    name="triggers.max_per_user",
    kind=int,
    default=200,
    minimum=1,
    maximum=10_000,
    title="Maximum number of triggers per user",
)
MAX_CHAIN = Setting(
    name="triggers.max_chain",
    kind=int,
    default=5,
    minimum=1,
    maximum=20,
    title="Maximum length of an event's chain of causes at which the event still fires triggers",
)
ALL = (MAX_FAILURES, HISTORY_DAYS, MIN_INTERVAL_SECONDS, MAX_PER_USER, MAX_CHAIN)
