"""The request and response bodies of the agent routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, Name, Slug, Tags, Text, line, text_format
from corral_plugins.agents.api import AttemptStatistics
from corral_plugins.tasks.api import RetryPolicy, ReviewPolicy, StallPolicy

Status = Literal["offline", "idle", "busy", "draining", "paused", "error"]

TOOL = r"^[a-z][a-z0-9_]*(\.[a-z0-9_-]+)*\.([a-z0-9_-]+|\*)(?![\s\S])"
ToolName = Annotated[
    str,
    text_format(TOOL, "the name of a tool, such as http.fetch, or of a group of tools, such as http.*", max_length=200),
]
Model = Annotated[str, line(200)]
Dollars = Annotated[float, Meta(ge=0, le=1_000_000_000)]
Label = Annotated[
    str,
    text_format(r"^[a-z0-9._/-]{1,63}(?![\s\S])", "the name of a label: 1 to 63 characters of a-z, 0-9, ., _, / and -"),
]
Policy = Literal["allow", "ask", "deny"]


class ToolRule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An agent's rule for one tool. `config` restricts the tool's own configuration."""

    policy: Policy | UnsetType = UNSET
    when_tainted: Policy | UnsetType = UNSET
    config: dict[str, Any] | UnsetType = UNSET


class WorkerSelector(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Selects the workers that may run the agent. A worker must match the group and all labels that are set."""

    group: Slug | None = None
    labels: Annotated[dict[Label, Annotated[str, Meta(max_length=255)]], Meta(max_length=50)] = {}


class AgentConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The settings of an agent that apply to each of its runs. In a change, absent fields stay unchanged."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | UnsetType | None = UNSET
    max_tokens: Annotated[int, Meta(ge=1, le=200_000)] | UnsetType | None = UNSET
    max_steps: Annotated[int, Meta(ge=1, le=200)] | UnsetType = UNSET
    fallback_models: Annotated[list[Model], Meta(max_length=5)] | UnsetType = UNSET
    output_schema: dict[str, Any] | UnsetType | None = UNSET
    memory: bool | UnsetType = UNSET
    knowledge: bool | UnsetType = UNSET


class AgentFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields that the owner of an agent may set, except the name."""

    description: Annotated[str, Meta(max_length=4000)] | UnsetType = UNSET
    role: Slug | UnsetType = UNSET
    llm_provider: Annotated[str, line(64)] | UnsetType | None = UNSET
    llm_model: Model | UnsetType | None = UNSET
    system_prompt: Text | UnsetType = UNSET
    enabled_tools: Annotated[list[ToolName], Meta(max_length=100)] | UnsetType = UNSET
    tool_policy: Annotated[dict[ToolName, Policy | ToolRule], Meta(max_length=200)] | UnsetType = UNSET
    worker_id: Id | UnsetType | None = UNSET
    worker_selector: WorkerSelector | UnsetType = UNSET
    config: AgentConfig | UnsetType = UNSET
    max_concurrent_tasks: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET
    monthly_budget_usd: Dollars | UnsetType | None = UNSET
    max_cost_per_task_usd: Dollars | UnsetType | None = UNSET
    retry_policy: RetryPolicy | UnsetType | None = UNSET
    stall_policy: StallPolicy | UnsetType | None = UNSET
    review_policy: ReviewPolicy | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class NewAgent(AgentFields, kw_only=True):
    """The fields of a new agent. Only the name is required."""

    name: Name


class AgentPatch(AgentFields, kw_only=True):
    """The agent fields to change. Absent fields stay unchanged."""

    name: Name | UnsetType = UNSET


class AgentView(msgspec.Struct, kw_only=True):
    """An agent.

    `version` increases with every change to the agent. `config_version` is the number of the newest version of the
    agent's configuration. `spent_month_usd` is the agent's cost in the current month (UTC), or null if the `cost`
    plugin is not active.
    """

    id: str
    version: int
    config_version: int
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    name: str
    description: str
    role: str
    llm_provider: str | None
    llm_model: str | None
    system_prompt: str
    enabled_tools: list[str]
    tool_policy: dict[str, Any]
    worker_id: str | None
    worker_selector: dict[str, Any]
    config: dict[str, Any]
    max_concurrent_tasks: int
    monthly_budget_usd: float | None
    max_cost_per_task_usd: float | None
    retry_policy: dict[str, Any] | None
    stall_policy: dict[str, Any] | None
    review_policy: dict[str, Any]
    tags: list[str]
    metadata: dict[str, Any]
    status: Status
    status_reason: str | None
    current_task_ids: list[str]
    active_tasks: int
    last_active_at: Instant | None
    spent_month_usd: float | None
    warnings: list[str]


class AgentBudgetChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Changes to an agent's limits. Absent fields stay unchanged, and null removes a limit."""

    monthly_budget_usd: Dollars | UnsetType | None = UNSET
    max_cost_per_task_usd: Dollars | UnsetType | None = UNSET


class AgentBudget(msgspec.Struct, kw_only=True):
    """The limits of an agent, and its costs in the current month.

    `reserved_usd` and `remaining_usd` are null without a monthly budget. `spent_usd` is null if the `cost` plugin is
    not active.
    """

    version: int
    monthly_budget_usd: float | None
    max_cost_per_task_usd: float | None
    spent_usd: float | None
    reserved_usd: float | None
    remaining_usd: float | None


class AgentQuery(PageQuery, kw_only=True):
    """The filters and the sort order for listing agents. `status` and `status_filter` have the same meaning."""

    status_filter: list[Status] | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET
    role: list[Slug] | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    tag: list[Annotated[str, line(64)]] | UnsetType = UNSET
    worker_id: list[Id] | UnsetType = UNSET
    sort: Literal["created", "name", "last_active"] = "created"


class DeleteAgentQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for deleting an agent. `force` ends the agent's live leases and cancels their tasks."""

    force: bool = False


class StartAgent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for starting an agent. `override` lets an admin start an agent whose budget is used up."""

    override: bool = False


class StopAgent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for stopping an agent.

    The mode `immediate` revokes the agent's leases, and `drain` waits until its leases end. In the mode `immediate`,
    `cancel_tasks` also cancels the tasks of the revoked leases.
    """

    mode: Literal["immediate", "drain"] = "immediate"
    cancel_tasks: bool = False
    reason: Annotated[str, line(500, 0)] | None = None


class PauseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to pause or resume an agent. The `reason` is included in the event about the state change."""

    reason: Annotated[str, line(500, 0)] | None = None


class CloneAgent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request to clone an agent: the name of the copy."""

    name: Name


class RollBack(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request to roll back an agent: the number of the earlier version to restore."""

    version: Annotated[int, Meta(ge=1)]


class VersionQuery(PageQuery, kw_only=True):
    """The page of versions to return. Versions are sorted newest first."""


class AgentVersionView(msgspec.Struct, kw_only=True):
    """A version of the configuration, with statistics about the attempts that used it.

    The statistics cover only the newest 10,000 attempts of the agent. They are null if the `tasks` plugin is not
    active, or if there are older attempts and none of the newest 10,000 used this version.
    """

    n: int
    changed_fields: list[str]
    by: str | None
    at: Instant
    attempts: int | None
    success_rate: float | None
    cost_usd: float | None


class AgentVersionDetail(AgentVersionView, kw_only=True):
    """A version with its complete configuration."""

    configuration: dict[str, Any]


class CompareQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The two versions to compare."""

    before: Annotated[int, Meta(ge=1)] = msgspec.field(name="from")
    after: Annotated[int, Meta(ge=1)] = msgspec.field(name="to")


class FieldDifference(msgspec.Struct, kw_only=True):
    """A field that differs between two versions, with its value in each of them."""

    field: str
    before: Any = msgspec.field(name="from")
    after: Any = msgspec.field(name="to")


class ComparedStatistics(msgspec.Struct, kw_only=True):
    """Statistics about the attempts that used each version. They are null if the `tasks` plugin is not active."""

    before: AttemptStatistics | None = msgspec.field(name="from")
    after: AttemptStatistics | None = msgspec.field(name="to")


class Comparison(msgspec.Struct, kw_only=True):
    """The differences between two versions."""

    diff: list[FieldDifference]
    stats: ComparedStatistics


class AgentStatsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query for an agent's statistics. `days` is the number of past days to cover."""

    days: Annotated[int, Meta(ge=1, le=365)] = 30


class AgentStats(AttemptStatistics, frozen=True, kw_only=True):
    """Statistics about an agent's attempts in the last `days` days, limited to the newest 10,000 attempts."""

    days: int


class NewAgentToken(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a new standing token.

    `scopes` limit the permissions of the token. Each scope is the name of a permission, or a pattern: `<plugin>.*`,
    `*.<verb>` or `*`.
    """

    name: Name
    expires_at: MomentIn | None = None
    scopes: Annotated[list[Annotated[str, line(100)]], Meta(min_length=1, max_length=100)] = msgspec.field(
        default_factory=lambda: ["*"]
    )


class AgentTokenView(msgspec.Struct, kw_only=True):
    """A standing token without its secret value."""

    id: str
    agent_id: str
    name: str
    scopes: list[str]
    created_by: str
    created_at: Instant
    expires_at: Instant


class IssuedAgentToken(AgentTokenView, kw_only=True):
    """A new standing token. Only this response contains `token`."""

    token: str


class AgentTokenQuery(PageQuery, kw_only=True):
    """The page of tokens to return. Tokens are sorted newest first."""
