"""Request and response shapes of the tools API, and the event of a call."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.errors import Fault
from corral.events.event import Event
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn
from corral_plugins.tools.api import Policy, Risk, Runs

Decision = Literal["allowed", "denied"]
Status = Literal["running", "permitted", "succeeded", "failed", "denied", "expired"]
ENDED = ("succeeded", "failed", "denied", "expired")
CallId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\x21-\x7e]+(?![\s\S])")]
ToolName = Annotated[str, Meta(min_length=1, max_length=200)]


class ToolView(msgspec.Struct, kw_only=True):
    """A tool. `policy`: its policy for the requested agent. `workers`: the online workers that offer it."""

    name: str
    version: int
    title: str
    description: str
    risk: Risk
    runs: Runs
    schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    default_policy: Policy
    enabled: bool
    source: str
    untrusted_output: bool
    idempotent: bool
    timeout_seconds: int
    config: dict[str, Any]
    config_schema: dict[str, Any] | None
    definition_sha256: str
    policy: Policy | None
    workers: list[str]


class ToolQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list of tools. `agent_id`: include the policy for this agent."""

    risk: list[Risk] | UnsetType = UNSET
    source: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    runs: Runs | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class AgentQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The agent whose policy is included."""

    agent_id: Id | UnsetType = UNSET


class ToolPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Overrides of a tool; null restores the definition. The risk of a plugin's tool can only be raised."""

    enabled: bool | UnsetType = UNSET
    default_policy: Policy | UnsetType | None = UNSET
    risk: Risk | UnsetType | None = UNSET
    timeout_seconds: Annotated[int, Meta(ge=1, le=600)] | UnsetType | None = UNSET
    config: dict[str, Any] | UnsetType | None = UNSET


class NewCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call under a lease, which may also be named by the header `Corral-Lease` or by the token."""

    call_id: CallId
    arguments: Any = {}
    lease_id: Id | UnsetType = UNSET


class ReportedError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The failure of a tool on the worker."""

    type: Annotated[str, Meta(min_length=1, max_length=100)] = "tool_error"
    message: Annotated[str, Meta(max_length=65536)] = ""


class CallReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The outcome of a tool that ran on the worker; `error` may be a text."""

    permit: Annotated[str, Meta(min_length=1, max_length=100)]
    result: Any = None
    error: Annotated[str, Meta(max_length=65536)] | ReportedError | None = None
    duration_ms: Annotated[int, Meta(ge=0, le=10**9)] | None = None
    lease_id: Id | UnsetType = UNSET


class CallView(msgspec.Struct, kw_only=True):
    """A tool call. `attempt`: the fence of the claim. `permit`: lets the worker run the tool; shown to the worker only.

    A call that is `running` while its task waits for a person gets its result when the task continues.
    """

    id: str
    call_id: str
    task_id: str
    attempt: int
    agent_id: str
    tool: str
    arguments: Any
    arguments_sha256: str
    decision: Decision
    reason: str | None
    status: Status
    result: Any
    error: dict[str, Any] | None
    tainted: bool
    started_at: Instant
    finished_at: Instant | None
    duration_ms: int | None
    permit: str | UnsetType = UNSET
    permit_expires_at: Instant | UnsetType = UNSET


class CallQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list of tool calls."""

    agent_id: Id | UnsetType = UNSET
    tool: ToolName | UnsetType = UNSET
    decision: list[Decision] | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class WaitQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`wait`: seconds to wait for the end of the call."""

    wait: Annotated[float, Meta(ge=0, le=55)] = 0

    @cached_property
    def until(self) -> float:
        """When the wait ends (epoch seconds); fixed on first use, since the handler runs again on every event."""
        return clock.time_s() + self.wait


class Check(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call to decide on without making it. `tainted`: defaults to that of the task."""

    agent_id: Id
    task_id: Id | None = None
    arguments: Any = {}
    tainted: bool | UnsetType = UNSET


class Checked(msgspec.Struct, kw_only=True):
    """`reasons`: every rule that denies the call, in order. `errors`: where the arguments do not match the schema."""

    decision: Decision
    reasons: list[str]
    errors: list[Fault]


class ToolCalled(Event, kw_only=True):
    """A tool call ended."""

    event = "tool.called"

    task_id: str
    call_id: str
    tool: str
    decision: str
    status: str
    duration_ms: int | None
