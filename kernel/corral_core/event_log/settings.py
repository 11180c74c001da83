"""Run-time settings for the retention of events and jobs."""

from __future__ import annotations

from corral.plugin import Setting

RETENTION_DAYS = Setting(
    name="events.retention_days", kind=int, default=30, title="Days for which events are kept", minimum=1, maximum=365
)
MAX_ROWS = Setting(
    name="events.max_rows",
    kind=int,
    default=1_000_000,
    title="Maximum number of events",
    minimum=10_000,
    maximum=50_000_000,
)
JOBS_RETENTION_DAYS = Setting(
    name="jobs.retention_days", kind=int, default=7, title="Days for which ended jobs are kept", minimum=1, maximum=90
)

SETTINGS = (RETENTION_DAYS, MAX_ROWS, JOBS_RETENTION_DAYS)
