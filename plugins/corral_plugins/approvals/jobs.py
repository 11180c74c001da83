"""Background jobs of the `approvals` plugin."""

from __future__ import annotations

import functools

from corral.database.engine import Database, Work
from corral.database.unit import SYSTEM, UnitContext
from corral.events.log import LoggedEvent
from corral.jobs.job import Job, Schedule
from corral_plugins.approvals.api import Approvals
from corral_plugins.approvals.service.auto_approval import AutoApproval
from corral_plugins.approvals.service.opening import AUTO_APPROVE_JOB
from corral_plugins.approvals.service.timers import BATCH_SIZE, ApprovalTimers

SWEEP = UnitContext(label="job approvals.sweep", actor=SYSTEM)
REMIND = UnitContext(label="job approvals.remind", actor=SYSTEM)


async def end_overdue_approvals(database: Database, timers: ApprovalTimers) -> None:
    """Expire, escalate or automatically approve overdue requests, each in a separate unit of work."""
    while True:
        found = await database.read(timers.overdue, SWEEP)
        for approval_id, task_id in found:
            await database.work(functools.partial(timers.expire, approval_id, task_id), entry=SWEEP)
        if len(found) < BATCH_SIZE:
            return


async def remind_of_open_approvals(work: Work, timers: ApprovalTimers) -> None:
    """Remind approvers of undecided approval requests."""
    while await work(timers.remind, entry=REMIND) == BATCH_SIZE:
        continue


async def apply_rules(approval_id: str, rules: AutoApproval) -> None:
    """Approve a request without a person if one of the automatic approval rules matches it."""
    await rules.apply_rules(approval_id)


def on_run_ended(event: LoggedEvent, approvals: Approvals) -> None:
    """Cancel the open approvals of a workflow run that has ended."""
    approvals.cancel_for(run_id=event.object_id, reason="The workflow run has ended.")


RUN_ENDS = ("workflow.run.completed", "workflow.run.failed", "workflow.run.cancelled")
JOBS = (Job(AUTO_APPROVE_JOB, apply_rules),)
SCHEDULES = (
    Schedule("approvals.sweep", 15, end_overdue_approvals),
    Schedule("approvals.remind", 300, remind_of_open_approvals),
)
