"""The public interface of the `approvals` plugin: data types, events, and the `Approvals` service."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.events.event import Event
from corral.schema.fields import Id, MomentIn, Title, text_format

declare_codes(
    {
        "already_decided": (
            409,
            "The request has already been decided",
            "Fetch the object again. The first decision counts.",
        ),
        "approval_expired": (
            410,
            "The approval request has expired",
            "Nobody decided the request in time. The requester was notified and may submit a new request.",
        ),
        "self_approval": (
            403,
            "People cannot decide their own requests",
            "Ask another approver to decide. `corral approvals show ID` lists the approvers.",
        ),
    }
)

Kind = Literal["tool_call", "task_step", "workflow_step", "spend", "worker", "review", "custom"]
Risk = Literal["low", "medium", "high", "critical"]
Status = Literal["pending", "revision_requested", "approved", "rejected", "expired", "cancelled"]
OnTimeout = Literal["reject", "approve", "escalate"]
DecidingRole = Literal["admin", "member"]

RISKS: tuple[Risk, ...] = ("low", "medium", "high", "critical")
"""The risk levels, lowest first."""
OPEN: tuple[Status, ...] = ("pending", "revision_requested")
"""The statuses of an undecided approval request."""


class Approvers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The people who may decide an approval request: the listed users, and all users with one of the listed roles.

    Admins may always decide.
    """

    users: Annotated[list[Id], Meta(max_length=50)] = []
    roles: Annotated[list[DecidingRole], Meta(max_length=2)] = []


class NewApproval(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for an approval.

    `payload` is the content to execute, at most 256 KiB of JSON. `confidence` and `rubric` are the requester's own
    assessment of the payload. Approvers see them, but they do not affect the outcome. Set either `expires_at` or
    `expires_in_seconds`, from 15 minutes to 30 days in the future. `run_id` is the workflow run that will execute the
    payload, and `step` is the name of a step of that run.
    """

    title: Title
    type: Literal["task_step", "spend", "worker", "review", "custom"] = "custom"
    description: Annotated[str, Meta(max_length=16384)] = ""
    payload: Any = {}
    risk: Risk = "medium"
    task_id: Id | None = None
    run_id: Id | None = None
    step: (
        Annotated[
            str,
            text_format(
                r"^[a-z][a-z0-9_]{0,62}(?![\s\S])",
                "the name of a step: 1 to 63 characters of a-z, 0-9 and _, beginning with a letter",
            ),
        ]
        | None
    ) = None
    agent_id: Id | None = None
    approvers: Approvers | None = None
    required_approvals: Annotated[int, Meta(ge=1, le=10)] = 1
    allow_self: bool = False
    editable: bool = False
    confidence: Annotated[int, Meta(ge=0, le=100)] | None = None
    rubric: dict[str, Any] | None = None
    expires_at: MomentIn | UnsetType = UNSET
    expires_in_seconds: Annotated[int, Meta(ge=900, le=2_592_000)] | UnsetType = UNSET
    on_timeout: OnTimeout = "reject"
    escalate_to: Approvers | None = None


class Requester(msgspec.Struct, frozen=True, kw_only=True):
    """The user, agent, worker or workflow that requests an approval.

    `on_behalf_of` is the id of the person for whom the agent, worker or workflow works.
    """

    type: Literal["user", "agent", "worker", "workflow"]
    id: str
    on_behalf_of: str | None = None


class HeldToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call that waits for an approval.

    `target` names the object on which the call acts. `taint_sources` lists the untrusted sources that the run has read,
    and `tainted` is true if there are any. Only people who have all of the tool's `required_permissions` may decide.
    """

    id: str
    call_id: str
    tool: str
    target: str | None = None
    tainted: bool = False
    taint_sources: list[str] = []
    required_permissions: list[str] = []


class ApprovalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for an approval, made by another plugin.

    Unlike `NewApproval`, it may concern a tool call or a workflow step. `payload_sha256` is the hash of the content to
    execute, by default the hash of `payload`. If `approvers` is None, the default approvers for the risk may decide.
    `step_policy` contains the settings `on_reject` and `on_timeout` of a workflow step.
    """

    type: Kind
    title: str
    requested_by: Requester
    description: str = ""
    payload: Any = msgspec.field(default_factory=dict)
    payload_sha256: str | None = None
    risk: Risk = "medium"
    task_id: str | None = None
    run_id: str | None = None
    step: str | None = None
    agent_id: str | None = None
    agent_owner_id: str | None = None
    approvers: Approvers | None = None
    required_approvals: int = 1
    allow_self: bool = False
    editable: bool = False
    confidence: int | None = None
    rubric: dict[str, Any] | None = None
    expires_in_seconds: float | None = None
    on_timeout: OnTimeout = "reject"
    escalate_to: Approvers | None = None
    tool_call: HeldToolCall | None = None
    step_policy: dict[str, str] | None = None


class ApprovalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An approval in the form that other plugins receive.

    `payload` is the content to execute if the approval is granted: the requested payload or, if `is_edited` is true,
    an approver's edited version. `payload_sha256` is the hash of this content. `by` identifies who or what decided: a
    user id, `rule:<id>`, `timeout`, or null. `is_new` is false if `open` returned an existing approval.
    """

    id: str
    type: Kind
    status: Status
    payload: Any
    payload_sha256: str
    is_edited: bool
    note: str | None
    by: str | None
    expires_at: str
    task_id: str | None
    run_id: str | None
    step: str | None
    tool_call: HeldToolCall | None
    is_new: bool = False

    @property
    def decision(self) -> dict[str, Any]:
        """The decision in the form that the requester receives: `{status, note, by, edited_payload}`."""
        edited = self.payload if self.is_edited else None
        return {"status": self.status, "note": self.note, "by": self.by, "edited_payload": edited}


class InvolvedPeople(msgspec.Struct, frozen=True, kw_only=True):
    """The people whom an approval concerns.

    `approvers` lists the people who may decide, in addition to admins. The people in `excluded` may not decide.
    `requester_id` is the person who made the request, or on whose behalf it was made, or None.
    """

    approvers: list[Approvers]
    excluded: frozenset[str]
    requester_id: str | None


class Approvals(Protocol):
    """The service for approvals. Every method runs in the caller's unit of work.

    If an approval belongs to a task, lock the task first, because units of work lock tasks before approvals.
    """

    def open(self, request: ApprovalRequest, *, by: Principal) -> ApprovalFacts:
        """Create an approval request and return it.

        If an approval with the same hash is already open for the same task, or was rejected within the last
        `approvals.reject_cooldown_seconds`, return that approval instead. Raise `TooMany` (`quota_exceeded`) if the
        task has too many open approvals.
        """
        ...

    def request(self, new: NewApproval, *, by: Principal) -> ApprovalFacts:
        """Create an approval request on behalf of the caller, as `POST /approvals` does.

        Raise `Invalid` if the request refers to an object that the caller may not see.
        """
        ...

    def find(self, approval_id: str) -> ApprovalFacts | None:
        """Return an approval, or None if it does not exist."""
        ...

    def involved(self, approval_id: str) -> InvolvedPeople | None:
        """Return the people whom an approval concerns, or None if the approval does not exist."""
        ...

    def consume(self, approval_id: str, *, payload_sha256: str) -> Any:
        """Mark an approval as used for execution, and return the approved payload.

        An approval can be used only once. A single statement checks the hash, the status, the expiry and whether the
        approval was already used. Raise `Conflict` (`already_decided`) if one of the checks fails.
        """
        ...

    def record_execution(
        self, approval_id: str, *, status: str, tool_call_id: str, error: Mapping[str, Any] | None
    ) -> None:
        """Record the outcome of the approved tool call."""
        ...

    def resume_data(self, approval_id: str) -> dict[str, Any] | None:
        """Return the data that a task receives when it resumes after waiting for the approval.

        Return None if the task must continue to wait, because nobody has decided yet or the approved tool has not run
        yet.
        """
        ...

    def cancel_for(self, *, task_id: str | None = None, run_id: str | None = None, reason: str) -> int:
        """Cancel the open approvals of a task or a workflow run that has ended.

        Return the number of cancelled approvals.
        """
        ...


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 hash of a value's canonical JSON (sorted keys, no white space)."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def tool_call_hash(*, agent_id: str, task_id: str, tool: str, arguments: Any, target: str | None) -> str:
    """Return the hash that identifies a tool call and its arguments.

    An approval is valid only for a call with this hash.
    """
    return canonical_hash([agent_id, task_id, tool, arguments, target])


class ApprovalEvent(Event, kw_only=True):
    """The fields that all approval events share.

    `by` is the id of the person, agent or worker that caused the event, `rule:<id>`, `timeout`, or null.
    """

    approval_id: str
    type: str
    title: str
    risk: str
    status: str
    task_id: str | None
    run_id: str | None
    step: str | None
    agent_id: str | None
    by: str | None


class ApprovalCreated(ApprovalEvent, kw_only=True):
    """An approval was requested."""

    event = "approval.created"


class ApprovalUpdated(ApprovalEvent, kw_only=True):
    """An approval changed but was not resolved.

    `change` is `decision`, `revision`, `comment`, `escalation` or `reminder`.
    """

    event = "approval.updated"

    change: str


class ApprovalResolved(ApprovalEvent, kw_only=True):
    """An approval request was approved, rejected or cancelled, or has expired. `outcome` is the final status."""

    event = "approval.resolved"

    outcome: str
    note: str | None


EVENTS: Sequence[type[Event]] = (ApprovalCreated, ApprovalUpdated, ApprovalResolved)
