"""Background work of the audit log."""

from __future__ import annotations

from corral.jobs.job import Job, Schedule
from corral_plugins.audit.service.checkpoints import EVERY_SECONDS, Checkpoints
from corral_plugins.audit.service.log import CHECKPOINT_ROWS
from corral_plugins.audit.service.retention import DAY, Retention
from corral_plugins.audit.service.verify import Verification


async def checkpoint(checkpoints: Checkpoints) -> None:
    """Sign, now that so many rows are new."""
    await checkpoints.make(least=CHECKPOINT_ROWS)


async def checkpoint_hourly(checkpoints: Checkpoints) -> None:
    """Sign what the last hour brought."""
    await checkpoints.make()


async def verify_recent(verification: Verification) -> None:
    """Check the newest rows; admins hear of it when they are not whole."""
    await verification.recent()


async def retain(retention: Retention) -> None:
    """Remove what is older than the setting says."""
    await retention.run()


JOBS = (Job("audit.checkpoint", checkpoint),)
SCHEDULES = (
    Schedule("audit.checkpoint", EVERY_SECONDS, checkpoint_hourly),
    Schedule("audit.verify_recent", DAY, verify_recent),
    Schedule("audit.retain", DAY, retain),
)
