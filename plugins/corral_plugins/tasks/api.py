"""The public interface of the `tasks` plugin: data types, the `Tasks` service and the events.

An event is emitted for each transition of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.errors import FieldError, Invalid, declare_codes
from corral.events.event import Event
from corral.schema.fields import Id, Instant, MomentIn, Slug, Tags, line, text_format

declare_codes(
    {
        "lease_lost": (
            409,
            "The lease is no longer valid",
            "Another worker may hold the task now. Stop working on the task, and claim the next one.",
        ),
        "task_terminal": (
            409,
            "The task has ended",
            "A task that has ended cannot be changed. Retry it, or create a new one.",
        ),
        "cycle": (422, "The dependencies form a cycle", "Remove the dependency that leads back to the object itself."),
        "use_action": (
            422,
            "Only actions can change the status",
            "Use the operation for the change, such as `corral tasks cancel`, instead of writing the status.",
        ),
    }
)

CLAIM_TOPICS = (
    "task.created",
    "task.updated",
    "task.retried",
    "task.completed",
    "task.failed",
    "task.cancelled",
    "task.waiting",
    "agent.status",
    "circuit.closed",
    "circuit.half_opened",
    "agent.updated",
    "budget.changed",
    "worker.updated",
    "llm.provider_changed",
    "setting.changed",
    "system.alert",
)
"""The events that wake a pending claim. Whenever a task may have become claimable, at least one of them is emitted.

`system.alert` announces the kill switch.
"""
SIGNAL_TOPICS = ("task.updated", "task.cancelled", "task.failed", "task.completed", "task.retried")
"""The events that wake a pending `signals` call. One of them is emitted with every new signal."""

Priority = Literal["low", "medium", "high", "critical"]
ToolName = Annotated[
    str,
    text_format(
        r"^[A-Za-z0-9_.:/-]+(?![\s\S])",
        "only letters, digits and the characters . : / _ -",
        min_length=1,
        max_length=200,
    ),
]
FailureKind = Literal["error", "timeout", "lease_lost", "stalled"]


class RetryPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Decides whether and when a failed attempt is retried.

    With exponential backoff, the delay before retry n is min(max, initial x factor^(n-1)). Each delay is then increased
    or decreased at random by at most the fraction `jitter`. Fields that a task omits come from its agent, and fields
    that the agent omits come from the settings.
    """

    max_attempts: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET
    backoff: Literal["exponential", "linear", "fixed"] | UnsetType = UNSET
    initial_seconds: Annotated[float, Meta(ge=0, le=3600)] | UnsetType = UNSET
    factor: Annotated[float, Meta(ge=1, le=10)] | UnsetType = UNSET
    max_seconds: Annotated[float, Meta(ge=0, le=86400)] | UnsetType = UNSET
    jitter: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    retry_on: Annotated[list[FailureKind], Meta(max_length=4)] | UnsetType = UNSET
    non_retryable_types: Annotated[list[Annotated[str, line(100)]], Meta(max_length=50)] | UnsetType = UNSET


class StallPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Defines when a running attempt counts as stalled, and how the server reacts to a stalled attempt.

    A `stall_seconds` of 0 disables the detection of idle runs. Fields that a task omits come from its agent, and fields
    that the agent omits come from the settings.
    """

    stall_seconds: Annotated[int, Meta(ge=0, le=86400)] | UnsetType = UNSET
    loop_repeats: Annotated[int, Meta(ge=2, le=50)] | UnsetType = UNSET
    action: Literal["notify", "cancel", "retry"] | UnsetType = UNSET


class ReviewPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Defines who reviews a result before the task is completed."""

    mode: Literal["none", "human", "agent"] = "none"
    reviewer_agent_id: Id | None = None


BUDGETS = ("max_cost_usd", "monthly_budget_usd", "max_cost_per_task_usd")


def refuse_unenforced(fields: Mapping[str, Any], *, enforces_budgets: bool, performs_reviews: bool) -> None:
    """Raise `Invalid` if the given fields set a budget or require a review, but the responsible plugin is not active.

    The `cost` plugin enforces budgets, and the `code_reviews` plugin performs reviews. The fields are those of a task
    or an agent.
    """
    faults = [
        FieldError(f"/{name}", "not_allowed", "Budgets require the plugin cost, which is not active.")
        for name in BUDGETS
        if not enforces_budgets and fields.get(name) not in (None, UNSET)
    ]
    review = fields.get("review_policy")
    if isinstance(review, ReviewPolicy):
        faults += review_policy_faults(review, "/review_policy", performs_reviews=performs_reviews)
    if faults:
        raise Invalid(faults[0].detail, errors=faults)


def review_policy_faults(policy: ReviewPolicy, pointer: str, *, performs_reviews: bool) -> list[FieldError]:
    """Return the errors in a review policy that the type annotations of `ReviewPolicy` do not rule out."""
    if policy.mode != "none" and not performs_reviews:
        detail = "Reviews require the plugin code_reviews, which is not active."
        return [FieldError(f"{pointer}/mode", "not_allowed", detail)]
    if policy.mode == "agent" and policy.reviewer_agent_id is None:
        return [FieldError(f"{pointer}/reviewer_agent_id", "required", "Name the agent that reviews the results.")]
    if policy.mode != "agent" and policy.reviewer_agent_id is not None:
        detail = "Only the mode agent has a reviewer."
        return [FieldError(f"{pointer}/reviewer_agent_id", "not_allowed", detail)]
    return []


class TaskFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The task fields that the owner of a task can set, except the title."""

    description: Annotated[str, Meta(max_length=16384)] = ""
    instructions: Annotated[str, Meta(max_length=65536)] = ""
    input: dict[str, Any] = {}  # at most 256 KiB
    priority: Priority = "medium"
    agent_id: Id | None = None
    agent_role: Slug | None = None
    deadline: MomentIn | None = None
    required_tools: Annotated[list[ToolName], Meta(max_length=50)] = []
    allowed_tools: Annotated[list[ToolName], Meta(max_length=100)] | None = None
    depends_on: Annotated[list[Id], Meta(max_length=50)] = []
    available_at: MomentIn | None = None
    timeout_seconds: Annotated[int, Meta(ge=10, le=604_800)] | None = None
    queue_timeout_seconds: Annotated[int, Meta(ge=10, le=2_592_000)] | None = None
    max_cost_usd: Annotated[float, Meta(ge=0, le=1_000_000_000)] | None = None
    retry_policy: RetryPolicy | None = None
    stall_policy: StallPolicy | None = None
    output_schema: dict[str, Any] | None = None  # at most 32 KiB
    review_policy: ReviewPolicy | None = None
    tags: Tags = []
    metadata: dict[str, Any] = {}  # at most 16 KiB


class NewTask(TaskFields, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a task."""

    title: Annotated[str, line(200)]


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of a task that was created by another task or by a workflow.

    It consists of the parent task, the workflow run and its step, the ids of the triggers and tasks that led to the
    task, and the sources of untrusted content if the task is tainted.
    """

    parent_task_id: str | None = None
    cause_chain: tuple[str, ...] = ()
    workflow_run_id: str | None = None
    step_run_id: str | None = None
    tainted: bool = False
    taint_sources: tuple[str, ...] = ()


DIRECT_ORIGIN = Origin()


class TaskOverrides(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of a task that a retry may change. Omitted fields stay unchanged."""

    agent_id: Id | UnsetType | None = UNSET
    instructions: Annotated[str, Meta(max_length=65536)] | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    timeout_seconds: Annotated[int, Meta(ge=10, le=604_800)] | UnsetType = UNSET
    max_cost_usd: Annotated[float, Meta(ge=0, le=1_000_000_000)] | UnsetType | None = UNSET


class AttemptSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A summary of one attempt, as shown in the task's dead letter."""

    n: int
    worker_id: str
    agent_id: str
    agent_version: int
    started_at: str | None
    finished_at: str | None
    error: dict[str, Any] | None


class LeaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identifies a lease in a worker's request."""

    task_id: Annotated[str, msgspec.Meta(max_length=36)]
    lease_id: Annotated[str, msgspec.Meta(max_length=36)]


class LeaseState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a lease as reported to its worker.

    `state` is `ok`, `lost`, `cancel_requested` or `budget_warning`. `reason` is the kind of cancellation that was
    requested or, for a lost lease, the call with which the run itself ended the lease, such as `complete`. If the lease
    ended in any other way, `reason` is null.
    """

    task_id: str
    lease_id: str
    state: str
    expires_at: str | None
    reason: str | None = None


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The task, attempt, agent, worker, requester and workflow run of a lease.

    `is_live` is false after the lease has ended.
    """

    task_id: str
    lease_id: str
    attempt_id: str
    agent_id: str
    worker_id: str
    requester_id: str | None
    is_live: bool
    workflow_run_id: str | None = None


class LiveAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt whose lease is live.

    `cost_left_micro` is the part of the task's cost limit that remains for the attempt, in micro-USD, or None if the
    task has no limit.
    """

    attempt_id: str
    lease_until: str
    cost_left_micro: int | None


class LeaseView(msgspec.Struct, frozen=True, kw_only=True):
    """A live lease, as `GET /workers/{id}` returns it."""

    task_id: str
    lease_id: str
    agent_id: str
    since: str
    expires_at: str


class LeaseSignal(msgspec.Struct, frozen=True, kw_only=True):
    """A change in a lease's state that the server reports to the worker immediately.

    `state` is `lost` or `cancel_requested`.
    """

    seq: int
    task_id: str
    lease_id: str
    state: str


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed task with all the data that a worker needs to run it (see `docs/contract/workers.md`)."""

    task: Any
    agent: dict[str, Any]
    lease_id: str
    fence: int
    expires_at: str
    attempt: int
    agent_token: str
    gateway_url: str
    resume: dict[str, Any] | None
    context: dict[str, list[Any]]
    secrets: list[str]


class ClaimResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The response to a claim.

    `reason` is `ok` if tasks were leased, and otherwise states why no task was leased: `none`, `at_capacity`,
    `draining`, `budget_exhausted` or `kill_switch`. If open circuit breakers block some agents, `retry_at` is the
    earliest time at which a claim might lease tasks to these agents.
    """

    tasks: list[Claim]
    reason: str
    retry_at: Instant | UnsetType = UNSET


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A task and, if the task is leased, its current run. `allowed_tools` is null if all tools are allowed.

    `cause_chain` lists the ids of the triggers and tasks that led to the task, so that a trigger can recognise tasks
    that it caused itself.

    If the task is not leased, `lease_id` and `worker_id` are empty. `agent_id` is then also empty, unless the task
    names an agent.
    """

    task_id: str
    lease_id: str
    fence: int
    agent_id: str
    worker_id: str
    requester_id: str | None
    allowed_tools: list[str] | None
    tainted: bool
    taint_sources: list[str] = []
    cause_chain: tuple[str, ...] = ()


class QueueStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """The number of pending tasks, and the id and age in milliseconds of the oldest pending task."""

    depth: int
    oldest_pending_ms: int | None
    oldest_pending_id: str | None = None


class Tasks(Protocol):
    """The service for tasks. Every method runs in the caller's unit of work.

    Every transition is a single conditional UPDATE. If two transitions of the same task collide, one of them raises
    `Conflict`.
    """

    def create(
        self, new: NewTask, *, by: Principal, source: dict[str, Any] | None = None, origin: Origin = DIRECT_ORIGIN
    ) -> Any:
        """Create a task and return the `TaskView`. `source` is `{type, id}` and defaults to the caller."""
        ...

    def get(self, task_id: str, *, by: Principal) -> Any:
        """Return a task as a `TaskView`. Raise `NotFound` if it does not exist or is not visible to the caller."""
        ...

    def cancel(self, task_id: str, *, by: Principal, reason: str | None = None) -> Any:
        """Cancel a task and return the `TaskView` with the status `cancelled` or `cancelling`."""
        ...

    def retry(
        self,
        task_id: str,
        *,
        by: Principal,
        source: str,
        reason: str | None = None,
        from_checkpoint: bool = True,
        overrides: TaskOverrides | None = None,
    ) -> Any:
        """Retry a failed or cancelled task under the same id, and return the `TaskView`.

        `source` is `person` or `dead_letter`. `overrides` changes fields of the task before its next attempt. The open
        dead letter of the task becomes `retried`.
        """
        ...

    def give_up(self, task_id: str, *, by: Principal, message: str) -> str:
        """Fail a task, unless it has failed already, and add a dead letter for it. Return the id of the dead letter.

        Raise `Conflict` if the task is leased, being cancelled, completed or cancelled.
        """
        ...

    def add_missing_dead_letters(self, after: str) -> str | None:
        """Add dead letters to tasks that failed after the time `after` while the `dead_letter` plugin was not active.

        One call handles one batch. Return the value of `after` for the next batch, or None if there are no more tasks.
        """
        ...

    def attempts_between(self, task_id: str, *, after_fence: int, until_fence: int) -> list[AttemptSummary]:
        """Return at most 200 attempts of a task, oldest first, with fencing numbers in the given range.

        The range excludes `after_fence` and includes `until_fence`.
        """
        ...

    def statuses(self, task_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        """Return the status and the end time of each task, keyed by task id. Unknown ids are omitted."""
        ...

    def lock(self, task_id: str) -> bool:
        """Lock a task until the unit of work ends. Return False if the task does not exist.

        A unit of work must lock a task before it locks objects of other plugins that belong to the task.
        """
        ...

    def resume(self, task_id: str, *, kind: str, given: dict[str, Any], id: str | None = None) -> bool:
        """Queue a task that is waiting for an answer, and store the answer `given` for its next claim.

        Return False if the task is not waiting for an answer of this `kind`, or is waiting for an object other than
        `id`.
        """
        ...

    def end_review(self, task_id: str, review_id: str, *, approved: bool, message: str) -> bool:
        """Complete a task that is waiting for the review, or fail the task if the review was not approved.

        A failed task gets the error kind `rejected`. Return False if the task is not waiting for the review.
        """
        ...

    def replace_review(self, task_id: str, review_id: str, new_id: str) -> bool:
        """Make a task wait for a newer review instead of its current one.

        Return False if the task is not waiting for the review `review_id`.
        """
        ...

    def lock_held_run(self, task_id: str, lease_id: str, *, approval_id: str) -> Run:
        """Lock a task whose tool call required an approval, and return its run.

        Raise `Conflict` with the code `lease_lost` unless the task is waiting for this approval or the lease is still
        live.
        """
        ...

    def is_held(self, task_id: str, lease_id: str, *, approval_id: str) -> bool:
        """Return whether `lock_held_run` would return the run, without locking the task."""
        ...

    def claim(self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None) -> ClaimResponse:
        """Lease up to `max_tasks` tasks to the worker. If no task was leased, the `reason` in the response says why.

        Raise `NotFound` if there is no such worker.
        """
        ...

    def claimable(self, worker_id: str, *, limit: int) -> list[Any]:
        """Return the tasks that `claim` would lease now, in claim order, without leasing them.

        Raise `NotFound` if there is no such worker.
        """
        ...

    def renew_leases(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Renew the given leases of a worker, and return the state of each."""
        ...

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        """Return the live leases of a worker."""
        ...

    def read_signals(self, worker_id: str, *, after: int) -> list[LeaseSignal]:
        """Return up to 200 of the worker's signals whose sequence number is greater than `after`, oldest first."""
        ...

    def release_leases_of_worker(self, worker_id: str, *, reason: str) -> int:
        """End all live leases of a worker without consuming an attempt. Return the number of leases that were ended."""
        ...

    def release_leases_of_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        """End all live leases of an agent, and return the ids of the affected tasks.

        The tasks are cancelled if `cancel` is set. Otherwise they are queued again without consuming an attempt.
        """
        ...

    def cancel_all_leased(self, *, reason: str) -> int:
        """Request the cancellation of all leased tasks, and return their number.

        The kill switch calls this method in its `cancel` mode. The caller's unit of work handles the first batch of
        tasks, and a background job handles the rest.
        """
        ...

    def detach_agent(self, agent_id: str) -> int:
        """Clear `agent_id` in a deleted agent's unfinished tasks, so that other agents can claim them.

        Return the number of changed tasks.
        """
        ...

    def leased_task_ids(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the ids of the tasks with a live lease, grouped by agent."""
        ...

    def live_lease(self, task_id: str, lease_id: str) -> LeaseView | None:
        """Return the lease if it is the task's live lease, else None."""
        ...

    def live_attempt(self, task_id: str, lease_id: str) -> LiveAttempt | None:
        """Return the attempt of the lease, or None if the lease is not the task's live lease."""
        ...

    def stop_run(self, task_id: str, lease_id: str, *, kind: str, reason: str | None) -> bool:
        """Ask the worker to stop the run with this lease. `kind` is the kind of cancellation, such as `budget`.

        Return False if the lease has ended or its run is already being stopped.
        """
        ...

    def record_shortage(self, task_id: str, lease_id: str, *, scope: str, needed_micro: int, left_micro: int) -> None:
        """Record that a budget had too little money left for a call under this lease. `scope` is `global` or `agent`.

        The task is not claimed again for the same agent and model until the budget leaves enough for the call. The
        method does nothing if the lease has ended.
        """
        ...

    def lock_run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        """Lock the task, renew the lease, and return the lease's run, which must have started.

        Raise `Conflict` with the code `lease_lost` if the lease is not live, and `Forbidden` if the caller does not
        hold the lease.
        """
        ...

    def find_run(self, task_id: str) -> Run | None:
        """Return the run of a task without locking the task, or None if the task does not exist."""
        ...

    def taint_run(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        """Mark a task and its attempt as tainted, because the run received untrusted content from `sources`.

        Return True if the attempt was not tainted before.
        """
        ...

    def fail_run(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        """Fail the attempt. The retry policy decides whether the task is retried.

        The method does nothing if the lease has ended.
        """
        ...

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        """Return the facts about a lease of the task, even if the lease has ended.

        Return None if the lease does not exist.
        """
        ...

    def lease_states(self, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Return the state (`ok`, `cancel_requested` or `lost`) of each given lease, without renewing the leases."""
        ...

    def renew_lease(self, task_id: str, lease_id: str) -> None:
        """Renew a lease because its run has called the gateway or a tool."""
        ...

    def record_usage(
        self, task_id: str, lease_id: str, *, input_tokens: int, output_tokens: int, cost_usd: float | None = None
    ) -> None:
        """Record the usage of one gateway call under this lease, even if the lease has ended.

        `cost_usd` is None if the price of the call is unknown. Call this method exactly once per gateway call. The
        method does nothing if the task or the lease no longer exists.
        """
        ...

    def queue_statistics(self) -> QueueStatistics:
        """Return the number of pending tasks and the age of the oldest one."""
        ...


class TaskExecutor(Protocol):
    """Replaces the agent loop in the worker for the tasks that this executor handles.

    Both methods run in the claim's unit of work. They may read and write rows, but must not do any other I/O.
    """

    def handles(self, task: dict[str, Any]) -> bool:
        """Return whether this executor handles the task.

        `task` contains `id`, `source` (`{type, id}`), `workflow_run_id` and `step_run_id`.
        """
        ...

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration that the worker uses to run the task instead of the agent loop.

        The claim contains the configuration as `agent.config.executor`.
        """
        ...


class TaskEvent(Event, kw_only=True):
    """The fields that all task events share. `previous` is the status before the event, or null for a new task."""

    task_id: str
    title: str
    status: str
    previous: str | None
    priority: str
    agent_id: str | None
    worker_id: str | None
    attempt: int


class TaskCreated(TaskEvent, kw_only=True):
    """A task was created."""

    event = "task.created"


class TaskAssigned(TaskEvent, kw_only=True):
    """A worker claimed a task."""

    event = "task.assigned"


class TaskStarted(TaskEvent, kw_only=True):
    """A worker started a task."""

    event = "task.started"


class TaskProgressed(TaskEvent, kw_only=True):
    """A run reported progress. At most one event per second is emitted for each run."""

    event = "task.progress"

    progress: dict[str, Any]


class TaskWaiting(TaskEvent, kw_only=True):
    """A task started waiting for a person's approval or input."""

    event = "task.waiting"

    waiting_for: dict[str, Any] | None


class TaskStalled(TaskEvent, kw_only=True):
    """A run made no progress (`idle`) or repeated the same step (`loop`)."""

    event = "task.stalled"

    kind: str
    idle_ms: int


class TaskCompleted(TaskEvent, kw_only=True):
    """A task was completed."""

    event = "task.completed"

    result_summary: str
    duration_ms: int | None
    cost_usd: float


class TaskFailed(TaskEvent, kw_only=True):
    """A task failed permanently."""

    event = "task.failed"

    error: dict[str, Any]


class TaskCancelled(TaskEvent, kw_only=True):
    """A task was cancelled."""

    event = "task.cancelled"

    reason: str | None


class TaskRetried(TaskEvent, kw_only=True):
    """A task was queued again: by its retry policy, by a person, or from a dead letter."""

    event = "task.retried"

    source: str
    reason: str | None
    available_at: str


class TaskUpdated(TaskEvent, kw_only=True):
    """A task changed in a way that no other event describes.

    If a budget or a circuit breaker ended the task's attempt, `reason` says why the task returned to the queue.
    """

    event = "task.updated"

    reason: str | None = None


class TaskDeleted(TaskEvent, kw_only=True):
    """A task was deleted."""

    event = "task.deleted"


EVENTS: tuple[type[Event], ...] = (
    TaskCreated,
    TaskAssigned,
    TaskStarted,
    TaskProgressed,
    TaskWaiting,
    TaskStalled,
    TaskCompleted,
    TaskFailed,
    TaskCancelled,
    TaskRetried,
    TaskUpdated,
    TaskDeleted,
)
