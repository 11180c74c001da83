"""Lists, counts and shows approvals, with their comments."""

from __future__ import annotations

import unicodedata
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.http.page import Order, Page, PageQuery, paginate
from corral_plugins.approvals.api import OPEN, RISKS, Approvers, HeldToolCall, Requester
from corral_plugins.approvals.models import Approval, CommentRow
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.eligibility import Eligibility
from corral_plugins.approvals.shapes import (
    ApprovalCommentView,
    ApprovalCount,
    ApprovalItem,
    ApprovalQuery,
    ApprovalView,
    DecisionView,
    ExecutionView,
)

MAX_COMMENTS = 100
HOUR = 3600
URGENT_FIRST = (
    Order(Approval.urgency, descending=False),
    Order(Approval.expires_at, descending=False),
    Order(Approval.id, descending=False),
)
_OF_ITEM = frozenset(ApprovalItem.__struct_fields__) & frozenset(Approval._meta.fields)
_OF_VIEW = frozenset(ApprovalView.__struct_fields__) & frozenset(Approval._meta.fields)


class ApprovalListing:
    """Reads approvals for callers. Every method runs in the caller's unit of work."""

    def __init__(self, eligibility: Eligibility) -> None:
        self._eligibility = eligibility

    def list_approvals(self, query: ApprovalQuery, by: Principal) -> Page[ApprovalItem]:
        """Return a page of approvals, most urgent first: by risk, then by expiry."""
        where: Any = rows.readable(by)
        if "all" not in query.status:
            where &= _status_is_any(query.status)
        if query.assigned_to == "me":
            where &= self._eligibility.assigned_to(by)
        for name in ("type", "risk"):
            if isinstance(wanted := getattr(query, name), list):
                where &= getattr(Approval, name).in_(wanted)
        for name in ("task_id", "agent_id", "run_id"):
            if (wanted := getattr(query, name)) is not UNSET:
                where &= getattr(Approval, name) == wanted.lower()
        return paginate(
            Approval.select().where(where),
            query,
            by,
            scope="approvals",
            order=URGENT_FIRST,
            make=lambda row: ApprovalItem(**self._shared_fields(row, by, _OF_ITEM)),
        )

    def get(self, approval_id: str, by: Principal) -> ApprovalView:
        """Return an approval with its comments. Raise `NotFound` if no such approval is visible to the caller."""
        return self.view_of(rows.find_readable(approval_id, by), by)

    def count(self, by: Principal) -> ApprovalCount:
        """Count the pending approval requests, those that the caller may decide, and those that expire soon."""
        pending = rows.readable(by) & _status_is_any(["pending"])
        found: Any = Approval.select(Approval.risk, peewee.fn.COUNT(Approval.id)).where(pending).group_by(Approval.risk)
        by_risk: dict[str, int] = {**dict.fromkeys(RISKS, 0), **dict(found.tuples())}
        mine = Approval.select().where(pending & self._eligibility.assigned_to(by)).count()
        soon = Approval.select().where(pending & (Approval.expires_at <= clock.now(HOUR))).count()
        return ApprovalCount(pending=sum(by_risk.values()), assigned_to_me=mine, expiring_1h=soon, by_risk=by_risk)

    def list_comments(self, approval_id: str, query: PageQuery, by: Principal) -> Page[ApprovalCommentView]:
        """Return a page of the comments on an approval, oldest first."""
        row = rows.find_readable(approval_id, by)
        order = (Order(CommentRow.created_at, descending=False), Order(CommentRow.id, descending=False))
        found = CommentRow.select().where(CommentRow.approval_id == row.id)
        return paginate(found, query, by, scope=f"approvals:{row.id}", order=order, make=comment_view)

    # -- representations

    def view_of(self, row: Approval, by: Principal) -> ApprovalView:
        """Return the response body for an approval."""
        shared = self._shared_fields(row, by, _OF_VIEW)
        for name in ("description", "payload", "edited_payload", "rubric", "outcome_note"):
            shared[name] = visible_text(shared[name])
        newest = CommentRow.select().where(CommentRow.approval_id == row.id)
        newest = newest.order_by(CommentRow.created_at.desc(), CommentRow.id.desc()).limit(MAX_COMMENTS)
        return ApprovalView(
            **{
                **shared,
                "approvers": msgspec.convert(row.approvers, Approvers),
                "escalate_to": None if row.escalate_to is None else msgspec.convert(row.escalate_to, Approvers),
                "decisions": [msgspec.convert(each, DecisionView) for each in row.decisions],
                "execution": None if row.execution is None else msgspec.convert(row.execution, ExecutionView),
                "required": row.required_approvals,
                "comments": [comment_view(each) for each in reversed(list(newest))],
            }
        )

    def _shared_fields(self, row: Approval, by: Principal, columns: frozenset[str]) -> dict[str, Any]:
        status = rows.shown_status(row)
        held = None if row.tool_call is None else msgspec.convert(visible_text(row.tool_call), HeldToolCall)
        kind: Any = row.requester_type
        requester = Requester(type=kind, id=row.requester_id, on_behalf_of=row.on_behalf_of)
        return {
            **{name: getattr(row, name) for name in columns},
            "title": visible_text(row.title),
            "status": status,
            "requested_by": requester,
            "tool_call": held,
            "payload_sha256": rows.current_hash(row),
            "approvals": len(rows.approvals_of(row)),
            "can_decide": status == "pending" and self._eligibility.can_decide(row, by),
        }


def comment_view(row: CommentRow) -> ApprovalCommentView:
    """Return the response body for a comment."""
    author = {"type": row.author_type, "id": row.author_id}
    return ApprovalCommentView(
        id=row.id, approval_id=row.approval_id, author=author, body=visible_text(row.body), created_at=row.created_at
    )


def visible_text(value: Any) -> Any:
    """Return a JSON value in which invisible and bidirectional characters are replaced by text such as `<U+202E>`."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(map(_visible_character, value))
    if isinstance(value, dict):
        return {visible_text(name): visible_text(each) for name, each in value.items()}
    return [visible_text(each) for each in value] if isinstance(value, list) else value


def _visible_character(character: str) -> str:
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn") and character not in "\n\r\t"
    return f"<U+{ord(character):04X}>" if is_hidden else character


def _status_is_any(statuses: list[Any]) -> Any:
    """Return an SQL condition for approvals whose `rows.shown_status` is one of the given statuses."""
    overdue = (Approval.expires_at <= clock.now()) & (Approval.on_timeout == "reject")
    found: Any = Approval.status.in_(sorted({*statuses} - {*OPEN}))
    for status in {*statuses} & {*OPEN}:
        found |= (Approval.status == status) & ~overdue
    if "expired" in statuses:
        found |= Approval.status.in_(OPEN) & overdue
    return found
