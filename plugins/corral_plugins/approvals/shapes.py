"""The request and response bodies of the approvals API."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, ShortText, text_format
from corral_plugins.approvals.api import Approvers, HeldToolCall, Kind, OnTimeout, Requester, Risk, Status

Note = Annotated[str, Meta(max_length=4000)]
Sha256 = Annotated[str, text_format(r"^[0-9a-f]{64}(?![\s\S])", "a SHA-256 hash: 64 characters of 0-9 and a-f")]
CommentBody = Annotated[str, Meta(min_length=1, max_length=16384)]


class ApproveRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An approval of the requested payload, or of `edited_payload` instead.

    If `payload_sha256` is set, the decision is valid only for content with this hash.
    """

    note: Note | None = None
    payload_sha256: Sha256 | None = None
    edited_payload: Any = UNSET


class RejectRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rejection. The note is delivered to the requester."""

    note: Note | None = None


class RevisionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to revise the payload. The note is delivered to the requester."""

    note: Annotated[str, Meta(min_length=1, max_length=4000)]


class RevisedPayload(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The payload that replaces the requested one. Earlier decisions become void."""

    payload: Any
    description: Annotated[str, Meta(max_length=16384)] | UnsetType = UNSET


class CancelApproval(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The cancellation of an approval request. The reason is shown to the approvers."""

    reason: ShortText | None = None


class NewApprovalComment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new comment. It is delivered to the requester."""

    body: CommentBody


class BulkDecision(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One decision for many approval requests. Requests with high or critical risk are skipped."""

    ids: Annotated[list[Id], Meta(min_length=1, max_length=100)]
    decision: Literal["approve", "reject"]
    note: Note | None = None


class BulkItem(msgspec.Struct, kw_only=True):
    """The result for one approval: its status, or `skipped` or `failed` with an error code."""

    id: str
    status: str
    code: str | None = None


class BulkResult(msgspec.Struct, kw_only=True):
    """The results for all approval requests, in the order in which the caller listed them."""

    items: list[BulkItem]


class DecisionView(msgspec.Struct, kw_only=True):
    """One decision. `user_id` is the id of a person, `rule:<id>` or `timeout`."""

    user_id: str
    decision: Literal["approve", "reject", "revision"]
    note: str | None
    payload_sha256: str
    at: Instant


class ApprovalCommentView(msgspec.Struct, kw_only=True):
    """A comment on an approval."""

    id: str
    approval_id: str
    author: dict[str, str]
    body: str
    created_at: Instant


class ExecutionView(msgspec.Struct, kw_only=True):
    """The outcome of the approved tool call."""

    status: str
    tool_call_id: str
    error: dict[str, Any] | None


class ApprovalItem(msgspec.Struct, kw_only=True):
    """An approval in a list, without its payload.

    `can_decide` says whether the caller may decide the request now. `approvals` is the number of people who have
    approved it.
    """

    id: str
    version: int
    type: Kind
    title: str
    risk: Risk
    status: Status
    requested_by: Requester
    tool_call: HeldToolCall | None
    task_id: str | None
    run_id: str | None
    step: str | None
    agent_id: str | None
    payload_sha256: str
    approvals: int
    required_approvals: int
    can_decide: bool
    expires_at: Instant
    created_at: Instant
    updated_at: Instant
    resolved_at: Instant | None


class ApprovalView(ApprovalItem, kw_only=True):
    """An approval.

    `payload` is the requested content, and `edited_payload` is an approver's edited version. `payload_sha256` is
    the hash of the content to execute. All text is plain text, in which invisible characters are replaced by text such
    as `<U+200B>`.
    """

    description: str
    payload: Any
    edited_payload: Any
    approvers: Approvers
    allow_self: bool
    editable: bool
    confidence: int | None
    rubric: dict[str, Any] | None
    on_timeout: OnTimeout
    escalate_to: Approvers | None
    escalated: bool
    decisions: list[DecisionView]
    required: int
    outcome_note: str | None
    execution: ExecutionView | None
    consumed_at: Instant | None
    comments: list[ApprovalCommentView]


class ApprovalQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing approvals. `assigned_to=me` selects the approval requests that the caller may decide."""

    status: list[Status | Literal["all"]] = msgspec.field(default_factory=lambda: ["pending"])
    assigned_to: Literal["me", "all"] = "all"
    type: list[Kind] | UnsetType = UNSET
    risk: list[Risk] | UnsetType = UNSET
    task_id: Id | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    run_id: Id | UnsetType = UNSET


class ApprovalWaitQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The query for getting an approval. `wait` is the maximum number of seconds to wait for a status change."""

    wait: Annotated[float, Meta(ge=0, le=55)] = 0

    @cached_property
    def poll_deadline(self) -> float:
        """The time at which the wait ends, in epoch seconds.

        The value is computed only once, because the handler runs repeatedly.
        """
        return clock.time_s() + self.wait

    def is_unchanged(self, status: str) -> bool:
        """Return whether the status is the same as in the first call of this method."""
        return bool(self.__dict__.setdefault("first_status", status) == status)


class ApprovalCount(msgspec.Struct, kw_only=True):
    """The counts of pending requests, of those that the caller may decide, and of those that expire within an hour."""

    pending: int
    assigned_to_me: int
    expiring_1h: int
    by_risk: dict[str, int]
