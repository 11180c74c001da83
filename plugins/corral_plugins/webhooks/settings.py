"""Settings of the `webhooks` plugin."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from corral.plugin import Setting

Delay = Annotated[int, Meta(ge=0, le=172_800)]

TIMEOUT_SECONDS = Setting(
    name="webhooks.timeout_seconds",
    kind=int,
    default=15,
    minimum=1,
    maximum=60,
    title="Time limit of an attempt to deliver an event, in seconds",
    env="CORRAL_WEBHOOK_TIMEOUT",
)
RETRY_SCHEDULE = Setting[list[int]](
    name="webhooks.retry_schedule",
    kind=list[Delay],
    default=[0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400],
    minimum=1,
    maximum=20,
    title="Seconds to wait before each attempt to deliver an event",
    description="The list contains one delay per delivery attempt, so its length is the maximum number of attempts. "
    "Each delay varies randomly by up to 10 %.",
    env="CORRAL_WEBHOOK_RETRY_SCHEDULE",
)


def _is_off_or_a_minute(value: int, settings: object) -> str | None:
    return "must be 0 (off) or at least 60" if 0 < value < 60 else None


DISABLE_AFTER_SECONDS = Setting(
    name="webhooks.disable_after_seconds",
    kind=int,
    default=432_000,
    minimum=0,
    maximum=2_592_000,
    check=_is_off_or_a_minute,
    title="Seconds without a success after which a failing webhook is disabled",
    description="If 0, failing webhooks are never disabled. Otherwise, a webhook is disabled only after at least 10 "
    "failed attempts.",
    env="CORRAL_WEBHOOK_DISABLE_AFTER",
)
MAX_PER_USER = Setting(
    name="webhooks.max_per_user",
    kind=int,
    default=50,
    minimum=1,
    maximum=1000,
    title="Maximum number of webhooks per user",
)
CONCURRENCY = Setting(
    name="webhooks.concurrency",
    kind=int,
    default=50,
    minimum=1,
    maximum=500,
    title="Maximum number of concurrent delivery attempts in the whole installation",
)


def _is_off_or_ten_seconds(value: int, settings: object) -> str | None:
    return "must be 0 (off) or at least 10" if 0 < value < 10 else None


PROBE_SECONDS = Setting(
    name="webhooks.probe_seconds",
    kind=int,
    default=60,
    minimum=0,
    maximum=3600,
    check=_is_off_or_ten_seconds,
    title="Seconds between the probes of a failing webhook in the first hour",
    description="If 0, failing webhooks are not probed. After one hour of failures, the interval is at least 5 "
    "minutes; after one day, it is at least 15 minutes.",
)
RETENTION_DAYS = Setting(
    name="webhooks.retention_days",
    kind=int,
    default=30,
    minimum=1,
    maximum=365,
    title="Days for which ended deliveries are kept, with their payloads",
)
ALL = (
    TIMEOUT_SECONDS,
    RETRY_SCHEDULE,
    DISABLE_AFTER_SECONDS,
    MAX_PER_USER,
    CONCURRENCY,
    PROBE_SECONDS,
    RETENTION_DAYS,
)
