"""Background work of the gateway."""

from __future__ import annotations

from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.llm.service import calls
from corral_plugins.llm.settings import TOTAL_TIMEOUT_SECONDS

GRACE_SECONDS = 60


def sweep(settings: Settings) -> None:
    """Calls that nobody will settle any more are `failed`."""
    calls.sweep(settings.get(TOTAL_TIMEOUT_SECONDS) + GRACE_SECONDS)


SCHEDULES = (Schedule("llm.sweep", 60, sweep),)
