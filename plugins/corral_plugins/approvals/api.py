"""The public interface of approvals: data types, the events, and the `Approvals` service."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.events.event import Event
from corral.schema.fields import Id, MomentIn, Title

declare_codes(
    {
        "already_decided": (
            409,
            "The approval has already been decided",
            "Read the object again; the decision that was made first counts.",
        ),
        "approval_expired": (
            410,
            "The approval has expired",
            "Nobody decided in time. Whoever asked was told and may ask again.",
        ),
        "self_approval": (
            403,
            "Nobody decides their own request",
            "Ask another approver to decide. `corral approvals show ID` lists who may.",
        ),
    }
)

Kind = Literal["tool_call", "task_step", "workflow_step", "spend", "worker", "review", "custom"]
Risk = Literal["low", "medium", "high", "critical"]
Status = Literal["pending", "revision_requested", "approved", "rejected", "expired", "cancelled"]
OnTimeout = Literal["reject", "approve", "escalate"]
DecidingRole = Literal["admin", "member"]

RISKS: tuple[Risk, ...] = ("low", "medium", "high", "critical")
"""The risks, the lowest first."""
OPEN: tuple[Status, ...] = ("pending", "revision_requested")
"""The states of an approval that nobody has decided yet."""


class Approvers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The people who may decide: the users with these ids, and everyone who has one of the roles.

    Admins may always decide.
    """

    users: Annotated[list[Id], Meta(max_length=50)] = []
    roles: Annotated[list[DecidingRole], Meta(max_length=2)] = []


class NewApproval(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for an approval.

    `payload` is the content that will be executed, at most 256 KiB of JSON. `confidence` and `rubric` are the
    requester's own assessment: approvers see it, but it does not affect the outcome. Give either `expires_at` or
    `expires_in_seconds`, from 15 minutes to 30 days. `run_id` is the workflow run that will execute the payload, and
    `step` is a step of that run.
    """

    title: Title
    type: Literal["task_step", "spend", "worker", "review", "custom"] = "custom"
    description: Annotated[str, Meta(max_length=16384)] = ""
    payload: Any = {}
    risk: Risk = "medium"
    task_id: Id | None = None
    run_id: Id | None = None
    step: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,62}(?![\s\S])")] | None = None
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
    """The user, agent, worker or workflow that asks for an approval.

    `on_behalf_of` is the id of the person for whom an agent, worker or workflow works.
    """

    type: Literal["user", "agent", "worker", "workflow"]
    id: str
    on_behalf_of: str | None = None


class HeldToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """The tool call that waits for an approval.

    `target` names the object on which the call acts. `taint_sources` are the untrusted sources that the run has read;
    `tainted` is true if there are any. Only people who hold the `required_permissions` of the tool may decide.
    """

    id: str
    call_id: str
    tool: str
    target: str | None = None
    tainted: bool = False
    taint_sources: list[str] = []
    required_permissions: list[str] = []


class ApprovalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for an approval from another plugin.

    Unlike `NewApproval`, it may be about a tool call or a step of a workflow. `payload_sha256` is the hash of the
    content that will be executed; the default is the hash of `payload`. If `approvers` is None, the default approvers
    for this risk decide. `step_policy` contains the paths of a workflow step.
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
    """An approval as other plugins see it.

    `payload` is what will run if the approval is granted: the requested payload or, if `is_edited` is true, the version
    that an approver edited. `payload_sha256` is its hash. `by` names who decided: a user id, `rule:<id>`, `timeout`, or
    null. `is_new` is false if `open` returned an approval that already existed.
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
        """The decision as the requester receives it: `{status, note, by, edited_payload}`."""
        edited = self.payload if self.is_edited else None
        return {"status": self.status, "note": self.note, "by": self.by, "edited_payload": edited}


class InvolvedPeople(msgspec.Struct, frozen=True, kw_only=True):
    """The people whom an approval concerns.

    `approvers` lists who may decide besides admins, except `excluded`. `requester_id` is the person who asked, or for
    whom an agent, worker or workflow asked, or None.
    """

    approvers: list[Approvers]
    excluded: frozenset[str]
    requester_id: str | None


class Approvals(Protocol):
    """The service for approvals. Every method runs in the caller's unit of work.

    Lock the task first if an approval belongs to one: a unit of work locks tasks before approvals.
    """

    def open(self, request: ApprovalRequest, *, by: Principal) -> ApprovalFacts:
        """Open an approval, and return it.

        Return the existing approval instead if an approval with the same hash is open for the same task, or was
        rejected within `approvals.reject_cooldown_seconds`. Raise `TooMany` (`quota_exceeded`) if the task has too many
        open approvals.
        """
        ...

    def request(self, new: NewApproval, *, by: Principal) -> ApprovalFacts:
        """Open an approval for the caller, as `POST /approvals` does.

        Raise `Invalid` if the caller may not see an object that the request refers to.
        """
        ...

    def find(self, approval_id: str) -> ApprovalFacts | None:
        """Return an approval, or None if it does not exist."""
        ...

    def involved(self, approval_id: str) -> InvolvedPeople | None:
        """Return the people whom an approval concerns, or None if the approval does not exist."""
        ...

    def consume(self, approval_id: str, *, payload_sha256: str) -> Any:
        """Use an approval to execute what it approves, and return the approved payload.

        An approval can be used only once. A single statement checks the hash, the status, the expiry and earlier use.
        Raise `Conflict` (`already_decided`) if one of the checks fails.
        """
        ...

    def record_execution(
        self, approval_id: str, *, status: str, tool_call_id: str, error: Mapping[str, Any] | None
    ) -> None:
        """Record how the approved tool call ended."""
        ...

    def resume_data(self, approval_id: str) -> dict[str, Any] | None:
        """Return the data that a task receives when it resumes after it waited for the approval.

        Return None if the task must still wait, because nobody has decided or the approved tool has not run yet.
        """
        ...

    def cancel_for(self, *, task_id: str | None = None, run_id: str | None = None, reason: str) -> int:
        """Cancel the open approvals of a task or a workflow run that ended. Return their number."""
        ...


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 hash of the canonical JSON of a value (sorted keys, no white space)."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def tool_call_hash(*, agent_id: str, task_id: str, tool: str, arguments: Any, target: str | None) -> str:
    """Return the hash that identifies a tool call and its arguments.

    An approval is valid only for a call with this hash.
    """
    return canonical_hash([agent_id, task_id, tool, arguments, target])


class ApprovalEvent(Event, kw_only=True):
    """The fields that all events of approvals share.

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
    """Someone asked for an approval."""

    event = "approval.created"


class ApprovalUpdated(ApprovalEvent, kw_only=True):
    """An approval changed but is not resolved.

    `change` is `decision`, `revision`, `comment`, `escalation` or `reminder`.
    """

    event = "approval.updated"

    change: str


class ApprovalResolved(ApprovalEvent, kw_only=True):
    """An approval was approved, rejected or cancelled, or expired. `outcome` is the final status."""

    event = "approval.resolved"

    outcome: str
    note: str | None


EVENTS: Sequence[type[Event]] = (ApprovalCreated, ApprovalUpdated, ApprovalResolved)
