"""Run-time settings of the dead letter queue."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting

RETENTION_DAYS = Setting(
    name="dead_letter.retention_days",
    kind=int,
    default=180,
    minimum=1,
    maximum=3650,
    title="Days after which dead letters are deleted",
)
MAX_ROWS = Setting(
    name="dead_letter.max_rows",
    kind=int,
    default=10_000,
    minimum=100,
    maximum=1_000_000,
    title="Maximum number of dead letters; the oldest closed ones are deleted first",
)
RETRY_RATE = Setting(
    name="dead_letter.retry_rate_per_second",
    kind=int,
    default=5,
    minimum=1,
    maximum=50,
    title="Number of tasks that a batch retries per second",
)
ALERT_PER_HOUR = Setting(
    name="dead_letter.alert_per_hour",
    kind=int,
    default=20,
    minimum=0,
    maximum=100_000,
    title="Number of new dead letters in an hour above which admins are alerted (0: never)",
)

ALL: tuple[Setting[Any], ...] = (RETENTION_DAYS, MAX_ROWS, RETRY_RATE, ALERT_PER_HOUR)
