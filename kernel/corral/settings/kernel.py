"""Run-time settings that the kernel itself declares, in the categories general, http, jobs and plugins."""

from __future__ import annotations

import os
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from corral.plugin import Setting, Settings

KERNEL = "kernel"  # the owner of the kernel's settings; other settings name their plugin
JOBS_PER_CORE = 4
_ORIGIN = r"https?://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?"
_LINE = r"[^\x00-\x1f\x7f]*"


def _is_zone(value: str, settings: Settings) -> str | None:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return "must be the name of a time zone, such as Europe/Berlin"
    return None


SITE_NAME = Setting(
    name="general.site_name",
    kind=str,
    default="Corral",
    title="Name of this installation",
    minimum=1,
    maximum=100,
    pattern=_LINE,
)
TIMEZONE = Setting(
    name="general.timezone",
    kind=str,
    default="UTC",
    title="Time zone in which times are displayed",
    check=_is_zone,
    minimum=1,
    maximum=64,
)
CORS_ORIGINS = Setting[list[str]](
    name="http.cors_origins",
    kind=list[str],
    default=[],
    title="Origins whose pages may call the API (CORS)",
    maximum=100,
    pattern=_ORIGIN,
)
IN_FLIGHT = Setting(
    name="http.in_flight", kind=int, default=60, title="Concurrent requests per caller", minimum=1, maximum=1000
)
ACCESS_LOG = Setting(
    name="http.access_log",
    kind=str,
    default="errors",
    choices=("off", "errors", "all"),
    title="Requests written to the access log",
)
RATE = Setting(
    name="http.rate_per_minute",
    kind=int,
    default=1200,
    minimum=10,
    maximum=100_000,
    title="Requests per minute of a user or API key",
)
MACHINE_RATE = Setting(
    name="http.machine_rate_per_minute",
    kind=int,
    default=12_000,
    minimum=100,
    maximum=1_000_000,
    title="Requests per minute of a worker or agent",
)
ANONYMOUS_RATE = Setting(
    name="http.anonymous_rate_per_minute",
    kind=int,
    default=120,
    minimum=10,
    maximum=100_000,
    title="Requests per minute of a client address without a credential",
)
JOBS_CONCURRENCY: Setting[int | None] = Setting(
    name="jobs.concurrency",
    kind=int,
    default=None,
    minimum=1,
    maximum=256,
    title=f"Concurrent jobs per process (unset: {JOBS_PER_CORE} per core)",
)
CALL_BUDGET_SECONDS = Setting(
    name="plugins.call_budget_seconds",
    kind=int,
    default=5,
    minimum=1,
    maximum=60,
    title="Time limit for calls to plugins, in seconds",
)
QUARANTINE_ERRORS = Setting(
    name="plugins.quarantine_errors",
    kind=int,
    default=5,
    minimum=1,
    maximum=100,
    title="Number of errors after which a plugin is quarantined",
)
QUARANTINE_WINDOW_SECONDS = Setting(
    name="plugins.quarantine_window_seconds",
    kind=int,
    default=60,
    minimum=10,
    maximum=3600,
    title="Period in which the errors of a plugin are counted, in seconds",
)

KERNEL_SETTINGS: tuple[Setting[Any], ...] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, Setting)
)


def job_concurrency(settings: Settings) -> int:
    """Return `jobs.concurrency`, or if it is unset a default that depends on the number of cores."""
    return settings.get(JOBS_CONCURRENCY) or min(256, JOBS_PER_CORE * (os.cpu_count() or 1))
