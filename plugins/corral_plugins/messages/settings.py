"""Run-time settings of the `messages` plugin."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting

DEFAULT_TTL = Setting(
    name="messages.default_ttl_seconds",
    kind=int,
    default=604_800,
    minimum=60,
    maximum=7_776_000,
    title="Seconds after which a message expires if its sender sets no expiry time",
)
REDELIVER_SECONDS = Setting(
    name="messages.redeliver_seconds",
    kind=int,
    default=600,
    minimum=60,
    maximum=86_400,
    title="Seconds after which an unacknowledged request is delivered again",
)
MAX_HOPS = Setting(
    name="messages.max_hops",
    kind=int,
    default=20,
    minimum=1,
    maximum=100,
    title="Maximum length of a chain of replies",
)
PAIR_PER_MINUTE = Setting(
    name="messages.pair_per_minute",
    kind=int,
    default=30,
    minimum=1,
    maximum=1000,
    title="Maximum number of messages per minute from one sender to one recipient",
)
CONTEXT_LIMIT = Setting(
    name="messages.context_limit",
    kind=int,
    default=10,
    minimum=0,
    maximum=50,
    title="Maximum number of messages that an agent receives with one claim of a task",
)
RETENTION_DAYS: Setting[int | None] = Setting(
    name="messages.retention_days",
    kind=int | None,
    default=365,
    minimum=1,
    maximum=3650,
    title="Days after which messages are deleted (null: never)",
)

ALL: tuple[Setting[Any], ...] = (
    DEFAULT_TTL,
    REDELIVER_SECONDS,
    MAX_HOPS,
    PAIR_PER_MINUTE,
    CONTEXT_LIMIT,
    RETENTION_DAYS,
)
