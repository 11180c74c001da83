"""The HTTP routes for approvals."""

from __future__ import annotations

import functools

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.http.answers import Answer, IfMatch, Request, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_plugins.approvals.api import OPEN, Approvals, NewApproval
from corral_plugins.approvals.service.comments import ApprovalComments
from corral_plugins.approvals.service.decisions import ApprovalDecisions
from corral_plugins.approvals.service.listing import ApprovalListing
from corral_plugins.approvals.shapes import (
    ApprovalCommentView,
    ApprovalCount,
    ApprovalItem,
    ApprovalQuery,
    ApprovalView,
    ApprovalWaitQuery,
    ApproveRequest,
    BulkDecision,
    BulkResult,
    CancelApproval,
    NewApprovalComment,
    RejectRequest,
    RevisedPayload,
    RevisionRequest,
)

READ, WRITE, DECIDE = "approvals.read", "approvals.write", "approvals.decide"
CHANGES = ("already_decided", "approval_expired", "precondition_failed")
DECISIONS = (*CHANGES, "self_approval", "reauth_required")

routes = Routes("/approvals", tag="Approvals")


@routes.get("/", needs=READ, live=True, raises=("invalid_cursor",))
def list_approvals(query: ApprovalQuery, listing: ApprovalListing, caller: Principal) -> Page[ApprovalItem]:
    """List approvals, most urgent first: by risk, then by expiry. Agents and workers see only their own requests."""
    return listing.list_approvals(query, caller)


@routes.post("/", needs=WRITE, status=201, also=(200,), redacted=True, raises=("unknown_reference", "quota_exceeded"))
def create_approval(
    body: NewApproval, approvals: Approvals, listing: ApprovalListing, caller: Principal
) -> Answer[ApprovalView]:
    """Request an approval.

    If the same content for the same task is already awaiting a decision, or was rejected recently, the response has the
    status 200 and contains the existing approval.
    """
    made = approvals.request(body, by=caller)
    return Answer(body=listing.get(made.id, caller), status=201 if made.is_new else 200)


@routes.get("/count", needs=READ)
def count_approvals(listing: ApprovalListing, caller: Principal) -> ApprovalCount:
    """Count the pending approval requests, and the requests that the caller may decide."""
    return listing.count(caller)


@routes.post("/bulk", needs=DECIDE, own_session=True, redacted=True)
async def decide_many(
    body: BulkDecision, decisions: ApprovalDecisions, caller: Principal, request: Request, work: Work
) -> BulkResult:
    """Decide many approval requests with one call. Each request is decided independently.

    Requests with high or critical risk are skipped.
    """
    entry = request.unit_context(caller)
    items = [
        await work(functools.partial(decisions.decide_one_of_many, each.lower(), body, by=caller), entry=entry)
        for each in dict.fromkeys(body.ids)
    ]
    return BulkResult(items=items)


@routes.get("/{id}", needs=READ, live=True, seconds=60.0)
def get_approval(id: str, query: ApprovalWaitQuery, listing: ApprovalListing, caller: Principal) -> ApprovalView | Wait:
    """Get an approval with its comments.

    If `wait` is set and the approval is open, the response is delayed until the approval's status changes, for at most
    `wait` seconds.
    """
    found = listing.get(id, caller)
    is_waiting = query.wait and found.status in OPEN and query.is_unchanged(found.status)
    if is_waiting and query.poll_deadline > clock.time_s():
        return Wait((id.lower(),), query.poll_deadline)
    return found


@routes.post("/{id}/approve", needs=DECIDE, own_session=True, raises=DECISIONS)
def approve_request(
    id: str, body: ApproveRequest, decisions: ApprovalDecisions, match: IfMatch, caller: Principal
) -> ApprovalView:
    """Approve the requested payload, or `edited_payload` instead.

    If more than one approval is required, the status stays `pending` until enough people have approved.
    """
    return decisions.approve(id, body, match, by=caller)


@routes.post("/{id}/reject", needs=DECIDE, own_session=True, redacted=True, raises=DECISIONS)
def reject_request(
    id: str, body: RejectRequest, decisions: ApprovalDecisions, match: IfMatch, caller: Principal
) -> ApprovalView:
    """Reject a request. The requester receives the note."""
    return decisions.reject(id, body, match, by=caller)


@routes.post(
    "/{id}/request-revision", needs=DECIDE, own_session=True, redacted=True, raises=(*DECISIONS, "invalid_state")
)
def request_revision(
    id: str, body: RevisionRequest, decisions: ApprovalDecisions, match: IfMatch, caller: Principal
) -> ApprovalView:
    """Ask the requester to revise the request."""
    return decisions.request_revision(id, body, match, by=caller)


@routes.post("/{id}/revise", needs=WRITE, redacted=True, raises=(*CHANGES, "invalid_state"))
def revise_request(
    id: str, body: RevisedPayload, decisions: ApprovalDecisions, match: IfMatch, caller: Principal
) -> ApprovalView:
    """Replace the payload of a request. Only its requester may do this. Earlier decisions become void."""
    return decisions.revise(id, body, match, by=caller)


@routes.post("/{id}/cancel", needs=WRITE, redacted=True, raises=CHANGES)
def cancel_request(
    id: str, body: CancelApproval, decisions: ApprovalDecisions, match: IfMatch, caller: Principal
) -> ApprovalView:
    """Cancel an undecided request. Only the requester and the owner of the task may do this."""
    return decisions.cancel(id, body.reason, match, by=caller)


@routes.get("/{id}/comments", needs=READ, raises=("invalid_cursor",))
def list_approval_comments(
    id: str, query: PageQuery, listing: ApprovalListing, caller: Principal
) -> Page[ApprovalCommentView]:
    """List the comments on an approval, oldest first."""
    return listing.list_comments(id, query, caller)


@routes.post("/{id}/comments", needs=WRITE, status=201, redacted=True)
def create_approval_comment(
    id: str, body: NewApprovalComment, comments: ApprovalComments, caller: Principal
) -> ApprovalCommentView:
    """Comment on an approval. The requester receives the comment immediately."""
    return comments.add(id, body.body, by=caller)
