"""Scheduled jobs of the `ssh` plugin, which mark abandoned commands as interrupted and delete old command records."""

from __future__ import annotations

from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.jobs.job import Schedule
from corral.plugin import Settings
from corral_plugins.ssh.service.executions import BATCH_ROWS, SshExecutions, delete_old_executions
from corral_plugins.ssh.settings import RETENTION_DAYS

REAP_SECONDS, DAY = 30, 86_400
REAP = UnitContext(label="job ssh.reap", actor=SYSTEM)
SWEEP = UnitContext(label="job ssh.sweep", actor=SYSTEM)


async def reap_executions(work: Work, executions: SshExecutions) -> None:
    """Mark running commands as interrupted if the process that ran them has died."""
    while await work(executions.interrupt_abandoned, entry=REAP) == BATCH_ROWS:
        continue


async def sweep_executions(work: Work, settings: Settings) -> None:
    """Delete the records of commands whose retention period has ended."""
    days = settings.get(RETENTION_DAYS)
    while await work(lambda: delete_old_executions(days, BATCH_ROWS), entry=SWEEP) == BATCH_ROWS:
        continue


SCHEDULES = (
    Schedule("ssh.reap", REAP_SECONDS, reap_executions),
    Schedule("ssh.sweep", DAY, sweep_executions),
)
