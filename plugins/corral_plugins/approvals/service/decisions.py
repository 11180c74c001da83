"""The actions of approvers (approve, reject, request a revision) and of requesters (revise, cancel).

Each action locks the approval's row. If several people decide at the same time, only one decision counts, and the other
people learn its outcome.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden, Gone, Invalid, NotFound, PreconditionFailed, Problem
from corral.http.answers import IfMatch
from corral_plugins.approvals.api import OPEN, ApprovalUpdated, canonical_hash, tool_call_hash
from corral_plugins.approvals.models import Approval
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.eligibility import Eligibility, is_high_risk
from corral_plugins.approvals.service.listing import ApprovalListing
from corral_plugins.approvals.service.opening import check_payload
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.shapes import (
    ApprovalView,
    ApproveRequest,
    BulkDecision,
    BulkItem,
    RejectRequest,
    RevisedPayload,
    RevisionRequest,
)
from corral_plugins.tools.api import Tools


class ApprovalDecisions:
    """The actions that people take on approval requests. Every method runs in the caller's unit of work."""

    tools: Tools | None

    def __init__(self, eligibility: Eligibility, outcomes: ApprovalOutcomes, listing: ApprovalListing) -> None:
        self._eligibility, self._outcomes, self._listing = eligibility, outcomes, listing

    # -- decisions of approvers

    def approve(self, approval_id: str, body: ApproveRequest, match: IfMatch, *, by: Principal) -> ApprovalView:
        """Approve the requested payload or an edited one. It can be executed when enough people have approved it."""
        row = self._lock_to_decide(approval_id, match, body.payload_sha256, by)
        changes = self._edit(row, body.edited_payload)
        content = changes.get("edited_sha256") or rows.current_hash(row)
        made = [*row.decisions, _decision(by.user_id or "", "approve", body.note, content)]
        given = [
            each["user_id"] for each in made if each["decision"] == "approve" and each["payload_sha256"] == content
        ]
        if len(given) >= row.required_approvals:
            able = {by.user_id, *self._eligibility.users_still_eligible(row, given)}
            made = [each for each in made if each["decision"] != "approve" or each["user_id"] in able]
            given = [each for each in given if each in able]
        if len(given) >= row.required_approvals:
            self._outcomes.resolve(row, "approved", by=by.user_id, note=body.note, decisions=made, **changes)
        else:
            rows.update_if_open(row, decisions=made, **changes)
            rows.publish(ApprovalUpdated, row, by.user_id, self._outcomes.causes_of(row), change="decision")
        self._outcomes.record_audit("approve", row, body.note)
        return self._listing.view_of(row, by)

    def reject(self, approval_id: str, body: RejectRequest, match: IfMatch, *, by: Principal) -> ApprovalView:
        """Reject a request. One rejection is enough, even if several approvals are required."""
        row = self._lock_to_decide(approval_id, match, None, by)
        made = [*row.decisions, _decision(by.user_id or "", "reject", body.note, rows.current_hash(row))]
        self._outcomes.resolve(row, "rejected", by=by.user_id, note=body.note, decisions=made)
        self._outcomes.record_audit("reject", row, body.note)
        return self._listing.view_of(row, by)

    def request_revision(
        self, approval_id: str, body: RevisionRequest, match: IfMatch, *, by: Principal
    ) -> ApprovalView:
        """Ask the requester to revise the request.

        Raise `Forbidden` if the caller may not decide the request, `Gone` if it has expired, and `Conflict` if it is
        not pending or a workflow step made it.
        """
        row = self._lock_to_decide(approval_id, match, None, by)
        if row.type == "workflow_step":
            detail = "A workflow cannot revise its request; reject it with a note instead."
            raise Conflict(detail, current_status=row.status)
        made = [*row.decisions, _decision(by.user_id or "", "revision", body.note, rows.current_hash(row))]
        rows.update_if_open(row, status="revision_requested", decisions=made, outcome_note=body.note)
        rows.publish(ApprovalUpdated, row, by.user_id, self._outcomes.causes_of(row), change="revision")
        self._outcomes.wake(row)
        self._outcomes.record_audit("request_revision", row, body.note)
        return self._listing.view_of(row, by)

    def decide_one_of_many(self, approval_id: str, bulk: BulkDecision, *, by: Principal) -> BulkItem:
        """Decide one of the approval requests in a bulk decision. Requests with high or critical risk are skipped."""
        try:
            if is_high_risk(rows.find_readable(approval_id, by)):
                return BulkItem(id=approval_id, status="skipped", code="approvals.risk_too_high")
            if bulk.decision == "approve":
                view = self.approve(approval_id, ApproveRequest(note=bulk.note), IfMatch(), by=by)
            else:
                view = self.reject(approval_id, RejectRequest(note=bulk.note), IfMatch(), by=by)
        except Problem as problem:  # every check precedes the first write
            return BulkItem(id=approval_id, status="failed", code=problem.code)
        return BulkItem(id=approval_id, status=view.status)

    def _lock_to_decide(self, approval_id: str, match: IfMatch, sha256: str | None, by: Principal) -> Approval:
        """Lock and return an approval request that the caller may decide now.

        The checks run in this order, which is part of the API contract: the caller's permission, expiry, earlier
        decisions, content.
        """
        row = self._lock(approval_id, by)
        self._eligibility.require_decider(row, by)
        self._require_in_time(row)
        if row.status != "pending":
            raise rows.already_decided_error(row.status)
        if any(each["user_id"] == by.user_id for each in rows.approvals_of(row)):
            raise Conflict("You have already approved this request.", code="already_decided", current_status=row.status)
        if sha256 is not None and sha256 != rows.current_hash(row):
            detail = "The payload has changed since you read it; read it again before you decide."
            raise PreconditionFailed(detail, current_version=row.version)
        match.check(row.version)
        return row

    def _lock(self, approval_id: str, by: Principal) -> Approval:
        found = rows.find_readable(approval_id, by)
        row = self._outcomes.lock(found.id, found.task_id)
        if row is None:
            raise NotFound("There is no approval request with this id.")
        return row

    @staticmethod
    def _require_in_time(row: Approval) -> None:
        if row.status == "expired" or rows.is_overdue(row):
            raise Gone(f"The approval request expired at {row.expires_at}.", code="approval_expired")

    def _edit(self, row: Approval, payload: Any) -> dict[str, Any]:
        """Return the column values for an edited payload and its hash.

        Raise `Invalid` if the payload of this request must not be edited.
        """
        if payload is UNSET:
            return {}
        if not row.editable:
            raise Invalid.at("/edited_payload", "not_allowed", "Approvers may not edit this payload.")
        check_payload(payload, "/edited_payload")
        if row.tool_call is None or self.tools is None:
            return {"edited_payload": payload, "edited_sha256": canonical_hash(payload)}
        held = row.tool_call
        target = self.tools.target_of_held_call(held["id"], payload, pointer="/edited_payload")
        sha256 = tool_call_hash(
            agent_id=row.agent_id, task_id=row.task_id, tool=held["tool"], arguments=payload, target=target
        )
        return {"edited_payload": payload, "edited_sha256": sha256}

    # -- actions of requesters

    def revise(self, approval_id: str, body: RevisedPayload, match: IfMatch, *, by: Principal) -> ApprovalView:
        """Replace the payload of a request. Earlier decisions become void, and approvers must decide again.

        Raise `Forbidden` if the caller is not the requester, `Gone` if the request has expired, and `Conflict` if it
        has already been decided or asks for a tool call.
        """
        row = self._lock(approval_id, by)
        if not _is_requester(row, by):
            raise Forbidden("Only the requester may revise the request.")
        self._require_in_time(row)
        if row.status not in OPEN:
            raise rows.already_decided_error(row.status)
        if row.type == "tool_call":
            detail = "Call the tool again with other arguments; the new call asks for a new approval."
            raise Conflict(detail, current_status=row.status)
        match.check(row.version)
        check_payload(body.payload, "/payload")
        changes: dict[str, Any] = {} if body.description is UNSET else {"description": body.description}
        rows.update_if_open(
            row,
            status="pending",
            payload=body.payload,
            payload_sha256=canonical_hash(body.payload),
            edited_payload=None,
            edited_sha256=None,
            decisions=[],
            outcome_note=None,
            **changes,
        )
        rows.publish(ApprovalUpdated, row, by.id, self._outcomes.causes_of(row, by), change="revision")
        return self._listing.view_of(row, by)

    def cancel(self, approval_id: str, reason: str | None, match: IfMatch, *, by: Principal) -> ApprovalView:
        """Cancel an undecided request. Only the requester, the owner of the task and admins may do this.

        Raise `Forbidden` for any other caller, and `Conflict` if the request has already been decided or has expired.
        """
        row = self._lock(approval_id, by)
        is_owner = by.kind in ("user", "api_key") and by.user_id == row.owner_id
        if not (_is_requester(row, by) or is_owner or by.is_admin):
            raise Forbidden("Only the requester, the owner of the task and admins may cancel the request.")
        if row.status not in OPEN or rows.is_overdue(row):
            raise rows.already_decided_error(rows.shown_status(row))
        match.check(row.version)
        self._outcomes.resolve(row, "cancelled", by=by.id, note=reason)
        return self._listing.view_of(row, by)


def _decision(user_id: str, decision: str, note: str | None, sha256: str) -> dict[str, Any]:
    return {"user_id": user_id, "decision": decision, "note": note, "payload_sha256": sha256, "at": clock.now()}


def _is_requester(row: Approval, by: Principal) -> bool:
    own = {"user": by.user_id, "api_key": by.user_id, "agent": by.agent_id, "worker": by.worker_id}.get(by.kind)
    kind = "user" if by.kind == "api_key" else by.kind
    return row.requester_type == kind and row.requester_id == own
