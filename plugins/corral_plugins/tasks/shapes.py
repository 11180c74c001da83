"""The request and response bodies of the task routes."""

from __future__ import annotations

from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn
from corral_plugins.tasks.api import NewTask, Priority, RetryPolicy, ReviewPolicy, StallPolicy

Status = Literal[
    "blocked", "pending", "assigned", "running", "waiting", "cancelling", "completed", "failed", "cancelled"
]
Level = Literal["debug", "info", "warning", "error"]
ReportedText = Annotated[str, Meta(max_length=16384)]
Reason = Annotated[str, Meta(max_length=500)]


def _patch_class_of(shape: type[msgspec.Struct], *, required: tuple[str, ...]) -> Any:
    """Return a copy of a request body class in which every field may be absent.

    A field named in `required` may be absent, but it cannot be null.
    """
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(shape):
        is_required = field.name in required
        kinds = [each for each in get_args(field.type) if not (is_required and each is NoneType)]
        kind = Union[tuple(kinds)] if get_origin(field.type) in (Union, UnionType) else field.type  # noqa: UP007
        fields.append((field.name, kind | UnsetType, UNSET))
    fields.append(("status", Any, UNSET))  # always rejected, because only actions change the status
    return msgspec.defstruct(
        "TaskPatch",
        fields,
        namespace={"__doc__": "The fields to change. Absent fields stay unchanged."},
        module=__name__,
        kw_only=True,
        forbid_unknown_fields=True,
    )


if TYPE_CHECKING:

    class TaskPatch(NewTask):
        """The task fields to change. Absent fields stay unchanged."""

        status: Any

else:
    TaskPatch = _patch_class_of(NewTask, required=("available_at", "timeout_seconds"))


class TaskQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for the list of tasks.

    If a filter is given several times, a task must match one of the values. `status` is the same filter as
    `status_filter`. `search` finds tasks whose title or description contains every search word, either as a whole word
    or as the beginning of one. Case is ignored. The search considers only the newest 10,000 matches.
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


class TaskGetQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The options for reading a task. `wait` is the maximum number of seconds to wait for the end of the task."""

    wait: Annotated[float, Meta(ge=0, le=55)] = 0

    @cached_property
    def poll_deadline(self) -> float:
        """The end of the wait, in seconds since the epoch. It is fixed when the request first checks the task."""
        return clock.time_s() + self.wait


class TaskStatsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Filters for the statistics: only tasks created since a given time, or only the tasks of one agent."""

    since: MomentIn | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class LogQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Selects the log lines of one attempt of a task, by default the latest attempt.

    Only lines whose `seq` is greater than `after` are returned. `wait` is the maximum number of seconds to wait for
    more lines.
    """

    fence: Annotated[int, Meta(ge=1)] | UnsetType = UNSET
    after: Annotated[int, Meta(ge=-1)] = -1
    level: list[Level] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 200
    wait: Annotated[float, Meta(ge=0, le=30)] = 0

    @cached_property
    def poll_deadline(self) -> float:
        """The end of the wait, in seconds since the epoch. It is fixed when the request first reads the log."""
        return clock.time_s() + self.wait


class TaskStats(msgspec.Struct, kw_only=True):
    """Task statistics. The success rate and the averages cover the current hour and the 24 hours before it."""

    total: int
    by_status: dict[str, int]
    by_priority: dict[str, int]
    oldest_pending_ms: int | None
    success_rate_24h: float | None
    avg_duration_ms: int | None
    avg_queue_ms: int | None
    waiting_for: dict[str, int]


class CancelRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The reason for a cancellation."""

    reason: Reason | None = None


class RetryRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for retrying a task. If `from_checkpoint` is false, the next attempt starts from the beginning."""

    from_checkpoint: bool = True
    reason: Reason | None = None


class NewComment(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new comment on a task. People can read the comment, and the next claim of the task passes it to the agent."""

    body: ReportedText
    lease_id: Id | UnsetType = UNSET


class InputAnswer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The answer that the task is waiting for."""

    input: Any


class CommentView(msgspec.Struct, kw_only=True):
    """A comment. `author` is `{type, id}`."""

    id: str
    author: dict[str, str]
    body: str
    created_at: Instant


class AttemptView(msgspec.Struct, kw_only=True):
    """An attempt, which is one claim of a task.

    `counted` is true if the attempt counts towards the limit of the retry policy. `result` is a result that arrived
    while the task was being cancelled; any other result is stored with the task. If `tainted` is true, the attempt has
    received untrusted content from `taint_sources`.
    """

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
    result: Any
    usage: dict[str, int]
    cost_usd: float
    tainted: bool
    taint_sources: list[str]


class LogView(msgspec.Struct, kw_only=True):
    """One log line of an attempt."""

    fence: int
    seq: int
    ts: Instant
    level: str
    message: str


class Condition(msgspec.Struct, kw_only=True):
    """A condition that must be met before a task can be claimed.

    `unblock` describes how to meet the condition, and `href` is the API path to use for this purpose.
    """

    code: str
    ok: bool
    detail: str
    unblock: str | None = None
    href: str | None = None


class Explanation(msgspec.Struct, kw_only=True):
    """The reasons why a task is or is not running, or how it ended.

    `warnings` names the agent's tools that are missing on at least one of the workers that may run the task. It also
    reports a cost limit that is too low for any model call.
    """

    status: str
    claimable: bool
    summary: str
    conditions: list[Condition]
    warnings: list[str]
    attempts: list[AttemptView]


class TaskCostSummary(msgspec.Struct, kw_only=True):
    """The cost of all attempts of a task.

    `unpriced_tokens` are tokens without a known price; `cost_usd` excludes them.
    """

    cost_usd: float
    unpriced_tokens: int
    input_tokens: int
    output_tokens: int
    calls: int


class TaskItem(msgspec.Struct, kw_only=True):
    """A task in a list, without `input` and `result`."""

    id: str
    version: int
    status: str
    title: str
    description: str
    instructions: str
    priority: str
    agent_id: str | None
    agent_role: str | None
    assigned_agent_id: str | None
    worker_id: str | None
    deadline: Instant | None
    required_tools: list[str]
    allowed_tools: list[str] | None
    depends_on: list[str]
    parent_task_id: str | None
    depth: int
    available_at: Instant
    timeout_seconds: int
    queue_timeout_seconds: int | None
    max_cost_usd: float | None
    retry_policy: RetryPolicy | None
    stall_policy: StallPolicy | None
    output_schema: dict[str, Any] | None
    review_policy: ReviewPolicy | None
    tags: list[str]
    metadata: dict[str, Any]
    attempt: int
    max_attempts: int
    fence: int
    reopened_count: int
    progress: dict[str, Any] | None
    artifacts: list[Any]
    error: dict[str, Any] | None
    cost: TaskCostSummary
    waiting_for: dict[str, Any] | None
    source: dict[str, Any]
    cause_chain: list[str]
    workflow_run_id: str | None
    step_run_id: str | None
    approval_id: str | None
    review_id: str | None
    dead_letter_id: str | None
    cancel_requested_at: Instant | None
    cancel_kind: str | None
    tainted: bool
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    queued_at: Instant | None
    assigned_at: Instant | None
    started_at: Instant | None
    finished_at: Instant | None


class TaskView(TaskItem, kw_only=True):
    """A task. `warnings` is present only in responses to requests that create or change the task."""

    input: dict[str, Any]
    result: Any
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET
