"""Records the outcomes of approval requests, and wakes their requesters in the same transaction."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.plugin import Audit, AuditEntry
from corral_plugins.approvals.api import ApprovalResolved
from corral_plugins.approvals.models import Approval
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.metrics import ApprovalMetrics
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Tools
from corral_plugins.workflows.api import Workflows


class ApprovalOutcomes:
    """Resolves approvals with any outcome. Every method runs in the caller's unit of work."""

    audit: Audit | None
    tasks: Tasks | None
    tools: Tools | None
    workflows: Workflows | None

    def __init__(self, metrics: ApprovalMetrics) -> None:
        self._metrics = metrics

    def lock(self, approval_id: str, task_id: str | None) -> Approval | None:
        """Lock the task, and then the approval. Return the approval, or None if it does not exist."""
        if task_id is not None and self.tasks is not None:
            self.tasks.lock(task_id)
        return rows.lock(approval_id)

    def resolve(self, row: Approval, status: str, *, by: str | None, note: str | None, **changes: Any) -> None:
        """Set the final status of a locked approval, and wake the requester."""
        rows.update_if_open(row, status=status, outcome_note=note, resolved_at=clock.now(), **changes)
        rows.publish(ApprovalResolved, row, by, self.causes_of(row), outcome=status, note=note)
        self._metrics.count_outcome(row)
        self.wake(row)

    def causes_of(self, row: Approval, by: Principal | None = None) -> tuple[str, ...] | None:
        """Return the ids of the triggers and tasks that led to the caller's task.

        If there are none, return those that led to the task or run that requested the approval. Triggers use the ids to
        detect loops. Return None if there are no ids, or if only people are involved.
        """
        own = by.task_id if by is not None else None
        caller = None if own is None or self.tasks is None else self.tasks.find_run(own)
        if caller is not None and caller.cause_chain:
            return caller.cause_chain
        if row.requester_type == "user":
            return None
        origin = None if row.task_id is None or self.tasks is None else self.tasks.find_run(row.task_id)
        if origin is not None:
            return origin.cause_chain or None
        run = None if row.run_id is None or self.workflows is None else self.workflows.find_run(row.run_id)
        return None if run is None else run.cause_chain or None

    def wake(self, row: Approval) -> None:
        """Let the requester continue after the approval was resolved or a revision was requested."""
        if row.type == "tool_call" and self.tools is not None:
            self.tools.approval_changed(row.tool_call["id"], status=row.status, note=row.outcome_note)
        else:
            self.resume_task(row, rows.facts_of(row).decision)

    def resume_task(self, row: Approval, decision: dict[str, Any]) -> None:
        """Queue the task that waits for the approval. Does nothing if no task waits for it."""
        if row.task_id is not None and self.tasks is not None:
            self.tasks.resume(row.task_id, kind="approval", id=row.id, given={"decision": decision})

    def record_audit(self, verb: str, row: Approval, note: str | None) -> None:
        """Record a decision in the audit log."""
        if self.audit is None:
            return
        details = {"payload_sha256": rows.current_hash(row), "risk": row.risk, "type": row.type, "note": note}
        details |= {name: getattr(row, name) for name in ("task_id", "run_id") if getattr(row, name) is not None}
        entry = AuditEntry(
            action=f"approvals.approval.{verb}",
            object_type="approval",
            object_id=row.id,
            object_name=row.title,
            details=details,
        )
        self.audit.record(entry)
