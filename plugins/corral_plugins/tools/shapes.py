"""Request and response bodies of the tools API."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.errors import FieldError
from corral.http.page import PageQuery
from corral.schema.fields import IDENTIFIER, Id, Instant, MomentIn, line, text_format
from corral_plugins.tools.api import RunLocation, ToolPolicy, ToolRisk

Decision = Literal["allowed", "asked", "denied"]
Status = Literal["pending_approval", "running", "permitted", "succeeded", "failed", "denied", "expired"]
ENDED = ("succeeded", "failed", "denied", "expired")
CallId = Annotated[
    str,
    text_format(r"^[\x21-\x7e]+(?![\s\S])", "ASCII characters without spaces", min_length=1, max_length=64),
    IDENTIFIER,
]
ToolName = Annotated[str, Meta(min_length=1, max_length=200)]


class ToolView(msgspec.Struct, kw_only=True):
    """A tool.

    `policy` is the policy of the tool for the requested agent. `workers` lists the online workers that offer the tool.
    `accepted` is false while an admin still has to accept the definition that an MCP server added or changed; until
    then, agents cannot use the tool.
    """

    name: str
    version: int
    title: str
    description: str
    risk: ToolRisk
    runs: RunLocation
    schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    default_policy: ToolPolicy
    enabled: bool
    source: str
    untrusted_output: bool
    idempotent: bool
    timeout_seconds: int
    config: dict[str, Any]
    config_schema: dict[str, Any] | None
    definition_sha256: str
    accepted: bool
    policy: ToolPolicy | None
    workers: list[str]


class ToolQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The filters for the list of tools. `agent_id` is the agent whose policies the response includes."""

    risk: list[ToolRisk] | UnsetType = UNSET
    source: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    runs: RunLocation | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class ToolAgentQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query parameters of a request for a single tool.

    `agent_id` is the agent whose policy the response includes.
    """

    agent_id: Id | UnsetType = UNSET


class ToolPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The overrides to change in a tool. Null restores the value from the tool definition.

    The risk of a tool from a plugin can only be raised.
    """

    enabled: bool | UnsetType = UNSET
    default_policy: ToolPolicy | UnsetType | None = UNSET
    risk: ToolRisk | UnsetType | None = UNSET
    timeout_seconds: Annotated[int, Meta(ge=1, le=600)] | UnsetType | None = UNSET
    config: dict[str, Any] | UnsetType | None = UNSET


class NewToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call under a lease.

    Without `lease_id`, the `Corral-Lease` header or the token identifies the lease.
    """

    call_id: CallId
    arguments: Any = {}
    lease_id: Id | UnsetType = UNSET


class ReportedToolError(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The failure of a tool that ran on a worker."""

    type: Annotated[str, Meta(min_length=1, max_length=100)] = "tool_error"
    message: Annotated[str, Meta(max_length=65536)] = ""


class ToolCallReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The outcome of a tool that ran on a worker.

    `error` is an object, or a string that contains only the message.
    """

    permit: Annotated[str, Meta(min_length=1, max_length=100)]
    result: Any = None
    error: Annotated[str, Meta(max_length=65536)] | ReportedToolError | None = None
    duration_ms: Annotated[int, Meta(ge=0, le=10**9)] | None = None
    lease_id: Id | UnsetType = UNSET


class ToolCallView(msgspec.Struct, kw_only=True):
    """A tool call.

    `attempt` is the fencing number of the attempt, which increases with each claim of the task. `permit` allows the
    worker to run the tool for at most `timeout_seconds`; only the worker receives these fields. If a call is `running`
    while the task waits for a person, its result is stored when the task continues. The status of a call that needs an
    approval is `pending_approval` until the call is rejected or expires, or until it is approved and the tool starts.
    If an approver changed the arguments, the worker must run the tool with `approved_arguments` instead of the original
    arguments.
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
    approval_id: str | None
    status: Status
    result: Any
    error: dict[str, Any] | None
    tainted: bool
    started_at: Instant
    finished_at: Instant | None
    duration_ms: int | None
    permit: str | UnsetType = UNSET
    permit_expires_at: Instant | UnsetType = UNSET
    timeout_seconds: int | UnsetType = UNSET
    approved_arguments: Any = UNSET


class ToolCallQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The filters for the list of tool calls."""

    agent_id: Id | UnsetType = UNSET
    tool: ToolName | UnsetType = UNSET
    decision: list[Decision] | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class WaitQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The query parameters of a request for a tool call.

    `wait` is the maximum number of seconds to wait for the end of the call.
    """

    wait: Annotated[float, Meta(ge=0, le=55)] = 0

    @cached_property
    def poll_deadline(self) -> float:
        """The time at which the wait ends, in seconds since the Unix epoch.

        The value is fixed on first use, because the handler runs again on every event.
        """
        return clock.time_s() + self.wait


class UncheckedToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call to check without running the tool.

    `tainted` specifies whether the run is assumed to have received untrusted content. By default, the state of the task
    applies; without a task, the run is assumed to be untainted.
    """

    agent_id: Id
    task_id: Id | None = None
    arguments: Any = {}
    tainted: bool | UnsetType = UNSET


class CallCheckResult(msgspec.Struct, kw_only=True):
    """The result of checking whether a tool call would be allowed.

    `reasons` lists every rule that denies the call, in order. `errors` contains an error for each part of the arguments
    that does not match the schema.
    """

    decision: Decision
    reasons: list[str]
    errors: list[FieldError]


McpName = Annotated[
    str,
    text_format(
        r"^[a-z0-9][a-z0-9_-]{0,62}(?![\s\S])",
        "1 to 63 characters of a-z, 0-9, _ and -, beginning with a letter or digit",
    ),
    IDENTIFIER,
]
McpUrl = Annotated[str, Meta(min_length=1, max_length=8192)]
McpStatus = Literal["ok", "changed", "down"]
OverriddenTool = Annotated[
    str, text_format(r"^[a-z0-9_-]{1,128}(?![\s\S])", "1 to 128 characters of a-z, 0-9, _ and -")
]
Sha256 = Annotated[str, text_format(r"^[0-9a-f]{64}(?![\s\S])", "a SHA-256 hash: 64 characters of 0-9 and a-f")]


class ToolOverride(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The values that an admin sets for a tool of an MCP server. A null `risk` means `external`."""

    risk: ToolRisk | None = None
    enabled: bool = True


ToolOverrides = Annotated[dict[OverriddenTool, ToolOverride], Meta(max_length=200)]


class NewMcpServer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An MCP server that Corral reaches over HTTP.

    `headers_secret` is the name of a secret. The secret contains a token, which is sent as `Authorization: Bearer
    …`, or a JSON object with headers. `tool_overrides` maps the last part of a tool's name to the risk and state
    that an admin sets.
    """

    name: McpName
    url: McpUrl
    transport: Literal["http"] = "http"
    headers_secret: Annotated[str, line(200)] | None = None
    enabled: bool = True
    tool_overrides: ToolOverrides = {}


class McpServerPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Changes to an MCP server. Absent fields keep their values; `tool_overrides` replaces all overrides."""

    url: McpUrl | UnsetType = UNSET
    transport: Literal["http"] | UnsetType = UNSET
    headers_secret: Annotated[str, line(200)] | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET
    tool_overrides: ToolOverrides | UnsetType = UNSET


class AcceptedDefinitions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The tool definitions that an admin accepts, identified by their current hashes."""

    definition_sha256: Annotated[list[Sha256], Meta(min_length=1, max_length=200)]


class McpToolItem(msgspec.Struct, kw_only=True):
    """A tool of an MCP server, as listed with the server. Agents cannot use a tool whose `status` is `changed`."""

    name: str
    status: Literal["ok", "changed"]


class McpToolView(McpToolItem, kw_only=True):
    """A tool as described by the MCP server.

    `remote_name` is the server's own name for the tool. The title, the description and the schemas are untrusted text.
    `accepted_sha256` is the hash of the definition that an admin accepted.
    """

    remote_name: str
    title: str
    description: str
    schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    definition_sha256: str
    accepted_sha256: str | None


class McpServerItem(msgspec.Struct, kw_only=True):
    """An MCP server in a list.

    `status` is `down` if the last attempt to list the tools failed, or else `changed` if an admin has to accept
    tools.
    """

    name: str
    version: int
    transport: Literal["http"]
    url: str
    enabled: bool
    status: McpStatus
    last_error: str | None
    tools: list[McpToolItem]
    listed_at: Instant | None
    created_at: Instant


class McpServerView(msgspec.Struct, kw_only=True):
    """An MCP server with its tools.

    `status` is `down` if the last attempt to list the tools failed, or else `changed` if an admin has to accept
    tools. `ignored_tools` names the tools that Corral cannot offer, because their names or schemas are unusable or
    there are too many tools.
    """

    name: str
    version: int
    transport: Literal["http"]
    url: str
    headers_secret: str | None
    enabled: bool
    tool_overrides: dict[str, ToolOverride]
    tools: list[McpToolView]
    ignored_tools: list[str]
    status: McpStatus
    last_error: str | None
    listed_at: Instant | None
    created_at: Instant
    updated_at: Instant
    warnings: list[str] | UnsetType = UNSET
