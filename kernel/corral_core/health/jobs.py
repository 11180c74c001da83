"""The scheduled jobs of the `health` plugin."""

from __future__ import annotations

from corral.database.engine import Work
from corral.jobs.job import Schedule
from corral_core.health.service.check_runner import HealthBoard, raise_alerts

EVERY_SECONDS = 30.0


async def watch_health(work: Work, board: HealthBoard) -> None:
    """Run all health checks, and raise an alert for each check that has been down for 60 s or has recovered."""
    await board.run_checks()
    views = board.last_results()
    await work(lambda: raise_alerts(views))


SCHEDULES = (Schedule("health.watch", EVERY_SECONDS, watch_health),)
