"""Background jobs and schedules of the audit log."""

from __future__ import annotations

from corral.jobs.job import Job, Schedule
from corral_plugins.audit.service.checkpoints import EVERY_SECONDS, Checkpoints
from corral_plugins.audit.service.log import CHECKPOINT_ROWS
from corral_plugins.audit.service.retention import DAY, Retention
from corral_plugins.audit.service.verify import Verification


async def checkpoint(checkpoints: Checkpoints) -> None:
    """Sign a checkpoint if at least `CHECKPOINT_ROWS` rows were added since the previous one."""
    await checkpoints.make(least=CHECKPOINT_ROWS)


async def checkpoint_hourly(checkpoints: Checkpoints) -> None:
    """Sign a checkpoint if any row was added since the previous one. Runs every hour."""
    await checkpoints.make()


async def verify_recent(verification: Verification) -> None:
    """Verify the newest rows. Raise an alert for admins if they are not intact."""
    await verification.recent()


async def retain(retention: Retention) -> None:
    """Remove rows older than `audit.retention_days`."""
    await retention.run()


JOBS = (Job("audit.checkpoint", checkpoint),)
SCHEDULES = (
    Schedule("audit.checkpoint", EVERY_SECONDS, checkpoint_hourly),
    Schedule("audit.verify_recent", DAY, verify_recent),
    Schedule("audit.retain", DAY, retain),
)
