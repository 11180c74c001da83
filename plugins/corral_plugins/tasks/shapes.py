"""Bodies and answers of the routes of tasks."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, Slug, Tags
from corral_plugins.tasks.api import (
    Priority,
    RetryPolicy,
    ReviewPolicy,
    StallPolicy,
    ToolName,
)

Status = Literal[
    "blocked", "pending", "assigned", "running", "waiting", "cancelling", "completed", "failed", "cancelled"
]
Level = Literal["debug", "info", "warning", "error"]
ReportedText = Annotated[str, Meta(max_length=16384)]
Reason = Annotated[str, Meta(max_length=500)]


class TaskPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an owner changes; absent fields stay."""

    title: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=16384)] | UnsetType = UNSET
    instructions: Annotated[str, Meta(max_length=65536)] | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    agent_id: Id | UnsetType | None = UNSET
    agent_role: Slug | UnsetType | None = UNSET
    deadline: MomentIn | UnsetType | None = UNSET
    required_tools: Annotated[list[ToolName], Meta(max_length=50)] | UnsetType = UNSET
    allowed_tools: Annotated[list[ToolName], Meta(max_length=100)] | UnsetType | None = UNSET
    depends_on: Annotated[list[Id], Meta(max_length=50)] | UnsetType = UNSET
    available_at: MomentIn | UnsetType = UNSET
    timeout_seconds: Annotated[int, Meta(ge=10, le=604_800)] | UnsetType = UNSET
    queue_timeout_seconds: Annotated[int, Meta(ge=10, le=2592000)] | UnsetType | None = UNSET
    max_cost_usd: Annotated[float, Meta(ge=0, le=1000000000)] | UnsetType | None = UNSET
    retry_policy: RetryPolicy | UnsetType | None = UNSET
    stall_policy: StallPolicy | UnsetType | None = UNSET
    output_schema: dict[str, Any] | UnsetType | None = UNSET
    review_policy: ReviewPolicy | UnsetType | None = UNSET
    tags: Tags | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET
    status: Any | UnsetType = UNSET  # refused: states change by actions


class TaskQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list. Repeated values mean any of them; `status` is the same as `status_filter`.

    `search`: tasks with words in title or description that begin with each of its words, without regard to case. Of
    the matches the newest 10,000 are counted, and combined with other filters.
    """

    status_filter: list[Status] | UnsetType = UNSET
    status: list[Status] | UnsetType = UNSET
    priority: list[Priority] | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    search: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    tag: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=20)] | UnsetType = UNSET
    worker_id: Id | UnsetType = UNSET
    parent_task_id: Id | UnsetType = UNSET
    workflow_run_id: Id | UnsetType = UNSET
    source_type: Literal["user", "agent", "trigger", "workflow", "review", "chat", "api"] | UnsetType = UNSET
    created_by: Id | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET
    until: MomentIn | UnsetType = UNSET
    sort: Literal["created", "priority", "updated"] = "created"


class GetQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`wait`: seconds to wait for the task's end."""

    wait: Annotated[float, Meta(ge=0, le=55)] = 0

    @cached_property
    def until(self) -> float:
        """Until when it waits, counted from the first look; a long poll runs again with the same query."""
        return clock.time_s() + self.wait


class StatsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Only tasks created since then, or of this agent."""

    since: MomentIn | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class LogQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Lines of one attempt (default: the latest) after `after`; `wait`: seconds to wait for more."""

    fence: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    after: Annotated[int, Meta(ge=-1)] = -1
    level: list[Level] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 200
    wait: Annotated[float, Meta(ge=0, le=30)] = 0

    @cached_property
    def until(self) -> float:
        """Until when it waits, counted from the first look."""
        return clock.time_s() + self.wait


class Stats(msgspec.Struct, kw_only=True):
    """Figures of all tasks; rate and averages are of the last 24 hours, by whole hours."""

    total: int
    by_status: dict[str, int]
    by_priority: dict[str, int]
    oldest_pending_ms: int | None
    success_rate_24h: float | None
    avg_duration_ms: int | None
    avg_queue_ms: int | None
    waiting_for: dict[str, int]


class Because(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Why; kept with the change."""

    reason: Reason | None = None


class Retry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`from_checkpoint` false: the next attempt begins anew."""

    from_checkpoint: bool = True
    reason: Reason | None = None


class NewComment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A remark for the next claim and for people."""

    body: ReportedText
    lease_id: Id | UnsetType = UNSET


class GivenInput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The answer to what the task waits for."""

    input: Any


class CommentView(msgspec.Struct, kw_only=True):
    """A remark; `author` is `{type, id}`."""

    id: str
    author: dict[str, str]
    body: str
    created_at: Instant


class AttemptView(msgspec.Struct, kw_only=True):
    """One claim of a task. `counted`: it used an attempt. `tainted`: it received content of these sources."""

    id: str
    fence: int
    n: int
    counted: bool
    worker_id: str
    agent_id: str
    agent_version: int
    model: str
    status: str
    started_at: Instant | None
    finished_at: Instant | None
    error: dict[str, Any] | None
    usage: dict[str, int]
    cost_usd: float
    tainted: bool
    taint_sources: list[str]


class LogView(msgspec.Struct, kw_only=True):
    """A line of a log."""

    fence: int
    seq: int
    ts: Instant
    level: str
    message: str


class Condition(msgspec.Struct, kw_only=True):
    """One thing that a claim asks for. `unblock` says what to do, `href` where."""

    code: str
    ok: bool
    detail: str
    unblock: str | None = None
    href: str | None = None


class Explanation(msgspec.Struct, kw_only=True):
    """Why a task runs, does not run, or how it ended."""

    status: str
    claimable: bool
    summary: str
    conditions: list[Condition]
    attempts: list[AttemptView]
