"""The run-time settings that the kernel itself declares, in the categories `http`, `jobs` and `plugins`."""

from __future__ import annotations

import os
from typing import Any

from corral.plugin import Setting, Settings

KERNEL = "kernel"  # the owner of the kernel's settings; other settings name their plugin
JOBS_PER_CORE = 4


def _plugin_limit(name: str, title: str, *, default: int, minimum: int, maximum: int) -> Setting[int]:
    return Setting(
        name=name, kind=int, title=title, default=default, minimum=minimum, maximum=maximum, own_session=True
    )


CORS_ORIGINS = Setting[list[str]](
    name="http.cors_origins",
    kind=list[str],
    default=[],
    title="Origins whose pages may call the API (CORS)",
    maximum=100,
    pattern=r"https?://[A-Za-z0-9.\-]+(:[0-9]{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?",
    accepts="origins without a path, such as https://app.example.org",
    own_session=True,
)
ACCESS_LOG = Setting(
    name="http.access_log",
    kind=str,
    default="errors",
    choices=("off", "errors", "all"),
    title="Which requests are written to the access log",
)
JOBS_CONCURRENCY: Setting[int | None] = Setting(
    name="jobs.concurrency",
    kind=int,
    default=None,
    minimum=1,
    maximum=256,
    title=f"Maximum number of concurrent jobs per process (unset: {JOBS_PER_CORE} per core)",
)
CALL_BUDGET_SECONDS = _plugin_limit(
    "plugins.call_budget_seconds", "Time limit of a call to a plugin, in seconds", default=5, minimum=1, maximum=60
)
QUARANTINE_ERRORS = _plugin_limit(
    "plugins.quarantine_errors", "Number of errors that quarantine a plugin", default=5, minimum=1, maximum=100
)
QUARANTINE_WINDOW_SECONDS = _plugin_limit(
    "plugins.quarantine_window_seconds", "Period for counting errors, in seconds", default=60, minimum=10, maximum=3600
)

KERNEL_SETTINGS: tuple[Setting[Any], ...] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, Setting)
)


def job_concurrency(settings: Settings) -> int:
    """Return `jobs.concurrency` or, if the setting is unset, a default that depends on the number of cores."""
    return settings.get(JOBS_CONCURRENCY) or min(256, JOBS_PER_CORE * (os.cpu_count() or 1))
