"""Background jobs and schedules of the audit log."""

from __future__ import annotations

from corral.jobs.job import Job, Schedule
from corral_plugins.audit.service.checkpoints import EVERY_SECONDS, CheckpointSigner
from corral_plugins.audit.service.log import CHECKPOINT_ROWS
from corral_plugins.audit.service.retention import DAY, AuditRetention
from corral_plugins.audit.service.verify import Verification


async def sign_checkpoint(checkpoints: CheckpointSigner) -> None:
    """Sign a checkpoint if at least `CHECKPOINT_ROWS` rows were added since the previous one."""
    await checkpoints.create_checkpoint(least=CHECKPOINT_ROWS)


async def sign_hourly_checkpoint(checkpoints: CheckpointSigner) -> None:
    """Sign a checkpoint if rows were added since the previous one. Runs every hour."""
    await checkpoints.create_checkpoint()


async def verify_recent_rows(verification: Verification) -> None:
    """Verify the newest rows. Raise an alert for admins if they are not intact."""
    await verification.verify_recent()


async def remove_expired_rows(retention: AuditRetention) -> None:
    """Remove rows older than `audit.retention_days`."""
    await retention.remove_expired_rows()


JOBS = (Job("audit.checkpoint", sign_checkpoint),)
SCHEDULES = (
    Schedule("audit.checkpoint", EVERY_SECONDS, sign_hourly_checkpoint),
    Schedule("audit.verify_recent", DAY, verify_recent_rows),
    Schedule("audit.retain", DAY, remove_expired_rows),
)
