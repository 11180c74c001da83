"""Reminders, escalation and expiry of undecided approval requests."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.plugin import Settings
from corral_plugins.approvals.api import ApprovalUpdated, Approvers
from corral_plugins.approvals.models import IS_OPEN, Approval
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.opening import add_approvers
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.settings import REMINDER

BATCH_SIZE = 100


class ApprovalTimers:
    """Ends overdue requests, and reminds people of open ones. Every method runs in the caller's unit of work."""

    def __init__(self, settings: Settings, outcomes: ApprovalOutcomes) -> None:
        self._settings, self._outcomes = settings, outcomes

    @staticmethod
    def overdue() -> list[tuple[str, str | None]]:
        """Return the ids and task ids of at most `BATCH_SIZE` overdue approval requests, longest overdue first."""
        found: Any = Approval.select(Approval.id, Approval.task_id).where(
            IS_OPEN & (Approval.expires_at <= clock.now())
        )
        return list(found.order_by(Approval.expires_at).limit(BATCH_SIZE).tuples())

    def expire(self, approval_id: str, task_id: str | None) -> None:
        """Escalate, approve or expire an overdue approval request, as specified by its `on_timeout` field.

        A request is escalated only once.
        """
        row = self._outcomes.lock(approval_id, task_id)
        if row is None or not rows.is_overdue(row):
            return
        if row.on_timeout == "escalate" and not row.escalated:
            rows.update_if_open(row, escalated=True, expires_at=clock.now(row.ttl_seconds))
            add_approvers(row.id, Approvers(**row.escalate_to))
            rows.publish(ApprovalUpdated, row, None, self._outcomes.causes_of(row), change="escalation")
        elif row.on_timeout == "approve" and row.status == "pending":
            made = {"user_id": "timeout", "decision": "approve", "note": None, "at": clock.now()}
            decisions = [*row.decisions, {**made, "payload_sha256": rows.current_hash(row)}]
            # The requester gets as much time to use the approval as people had to decide it.
            later = clock.now(row.ttl_seconds)
            self._outcomes.resolve(row, "approved", by="timeout", note=None, decisions=decisions, expires_at=later)
            self._outcomes.record_audit("approve", row, None)
        else:
            self._outcomes.resolve(row, "expired", by="timeout", note="Nobody decided in time.")

    def remind(self) -> int:
        """Publish reminders for a batch of approval requests that have been open for a while.

        Return the number of reminders.
        """
        seconds = self._settings.get(REMINDER)
        if not seconds:
            return 0
        now = clock.now()
        is_due = IS_OPEN & (Approval.reminded_at <= clock.now(-seconds)) & (Approval.expires_at > now)
        found = list(Approval.select().where(is_due).order_by(Approval.reminded_at).limit(BATCH_SIZE))
        for row in found:
            unchanged = (Approval.id == row.id) & (Approval.reminded_at == row.reminded_at) & IS_OPEN
            if Approval.update(reminded_at=now).where(unchanged).execute():
                rows.publish(ApprovalUpdated, row, None, self._outcomes.causes_of(row), change="reminder")
        return len(found)
