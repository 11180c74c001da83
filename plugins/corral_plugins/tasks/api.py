"""The public interface of tasks for other plugins: shapes and the service `Tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.schema.fields import Id, MomentIn, Slug, Tags, line

declare_codes(
    {
        "lease_lost": (409, "The lease is not the live one"),
        "task_terminal": (409, "The task has ended"),
        "cycle": (422, "A cycle"),
        "use_action": (422, "Use the action instead"),
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
    "agent.updated",
    "worker.updated",
    "system.alert",
)
"""The events that wake a waiting claim: one of them is emitted whenever a task may have become claimable.

`system.alert` announces the kill switch.
"""
SIGNAL_TOPICS = ("task.updated", "task.cancelled", "task.failed", "task.completed", "task.retried")
"""The events that wake a waiting `signals` call: one of them is emitted with every new signal."""

Priority = Literal["low", "medium", "high", "critical"]
ToolName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:/-]+(?![\s\S])")]
Kind = Literal["error", "timeout", "lease_lost", "stalled"]


class RetryPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When another attempt follows a failed one: the delay is min(max, initial x factor^(n-1)), +- jitter."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    backoff: Literal["exponential", "linear", "fixed"] = "exponential"
    initial_seconds: Annotated[float, Meta(ge=0, le=3600)] = 10
    factor: Annotated[float, Meta(ge=1, le=10)] = 2
    max_seconds: Annotated[float, Meta(ge=0, le=86400)] = 600
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.1
    retry_on: Annotated[list[Kind], Meta(max_length=4)] = msgspec.field(
        default_factory=lambda: ["error", "timeout", "lease_lost", "stalled"]
    )
    non_retryable_types: Annotated[list[Annotated[str, line(100)]], Meta(max_length=50)] = []


class StallPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a running attempt counts as stalled, and the action that follows. `stall_seconds` 0 means never."""

    stall_seconds: Annotated[int, Meta(ge=0, le=86400)] = 900
    loop_repeats: Annotated[int, Meta(ge=2, le=50)] = 6
    action: Literal["notify", "cancel", "retry"] = "notify"


class ReviewPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The reviewer of a result before the task is completed."""

    mode: Literal["none", "human", "agent"] = "none"
    reviewer_agent_id: Id | None = None


class TaskFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that an owner may set, beside the title."""

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
    """A task to create."""

    title: Annotated[str, line(200)]


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The parent task, workflow and causes of a task that was not created directly."""

    parent_task_id: str | None = None
    cause_chain: tuple[str, ...] = ()
    workflow_run_id: str | None = None
    step_run_id: str | None = None
    tainted: bool = False


DIRECT = Origin()


class LeaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lease, as a worker names it."""

    task_id: Annotated[str, msgspec.Meta(max_length=36)]
    lease_id: Annotated[str, msgspec.Meta(max_length=36)]


class LeaseState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a lease for its worker. `state`: ok | lost | cancel_requested | budget_warning."""

    task_id: str
    lease_id: str
    state: str
    expires_at: str | None
    reason: str | None = None


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The holder of a lease. `is_live` is false once it has ended."""

    task_id: str
    lease_id: str
    attempt_id: str
    agent_id: str
    worker_id: str
    requester_id: str | None
    is_live: bool


class LeaseView(msgspec.Struct, frozen=True, kw_only=True):
    """A live lease, as `GET /workers/{id}` shows it."""

    task_id: str
    lease_id: str
    agent_id: str
    since: str
    expires_at: str


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a lease that its worker must learn at once. `state`: lost | cancel_requested."""

    seq: int
    task_id: str
    lease_id: str
    state: str


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed task with everything that a worker needs to run it (`workers.md` of the documentation: claim)."""

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


class ClaimAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`reason`: ok | none | at_capacity | draining | budget_exhausted | kill_switch."""

    tasks: list[Claim]
    reason: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run under its live lease. `allowed_tools` is null when all tools are allowed.

    When the task is not leased, `lease_id` and `worker_id` are empty, and so is `agent_id` unless the task names one.
    """

    task_id: str
    lease_id: str
    fence: int
    agent_id: str
    worker_id: str
    requester_id: str | None
    allowed_tools: list[str] | None
    tainted: bool


class QueueFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The number of pending tasks, and the age of the oldest in milliseconds."""

    depth: int
    oldest_pending_ms: int | None


class Tasks(Protocol):
    """Joins the caller's unit. Every transition is one guarded update; when two collide, one raises `Conflict`."""

    def create(
        self, new: NewTask, *, by: Principal, source: dict[str, Any] | None = None, origin: Origin = DIRECT
    ) -> Any:
        """Create a task; returns the `TaskView`. `source` is `{type, id}`, by default the caller."""
        ...

    def get(self, task_id: str, *, by: Principal) -> Any:
        """The `TaskView`. Raises `NotFound` when the task is absent or not visible to the caller."""
        ...

    def cancel(self, task_id: str, *, by: Principal, reason: str | None = None) -> Any:
        """Cancel a task; returns the `TaskView`, `cancelled` or `cancelling`."""
        ...

    def reopen(self, task_id: str, *, by: Principal, source: str, reason: str | None = None) -> Any:
        """Try a failed or cancelled task again under the same id; returns the `TaskView`.

        `source`: person | dead_letter.
        """
        ...

    def resume(self, task_id: str, *, kind: str, given: dict[str, Any]) -> bool:
        """Queue a waiting task with the answer that it waited for; False when it does not wait for this kind."""
        ...

    def claim(self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None) -> ClaimAnswer:
        """Lease up to `max_tasks` tasks to this worker. `reason` says why none was leased."""
        ...

    def claimable(self, worker_id: str, *, limit: int) -> list[Any]:
        """The tasks that `claim` would take now, in its order, without taking them."""
        ...

    def renew(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Renew these leases of the worker; returns the state of each."""
        ...

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        """The live leases of a worker."""
        ...

    def signals(self, worker_id: str, *, after: int) -> list[Signal]:
        """The signals for a worker after a sequence number, oldest first, at most 200."""
        ...

    def release_worker(self, worker_id: str, *, reason: str) -> int:
        """End every live lease of a worker without using an attempt; returns how many."""
        ...

    def release_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        """End every live lease of an agent, and queue its tasks without using an attempt, or cancel them; the ids."""
        ...

    def cancel_leased(self, *, reason: str) -> int:
        """Request the cancellation of every leased task, for the kill switch in mode `cancel`; returns how many.

        This unit asks the first ones, a job the rest.
        """
        ...

    def detach_agent(self, agent_id: str) -> int:
        """An agent is deleted: clear the `agent_id` of its waiting tasks; returns how many."""
        ...

    def live_tasks(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        """Ids of the tasks under a live lease of each agent."""
        ...

    def live_lease(self, task_id: str, lease_id: str) -> LeaseView | None:
        """The lease, if it is the live lease of the task."""
        ...

    def run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        """The started run of this lease, with its task locked and its lease renewed.

        Raises `Conflict` with `lease_lost` when the lease is not live, `Forbidden` when the caller does not hold it.
        """
        ...

    def run_of(self, task_id: str) -> Run | None:
        """The run of a task, not locked; None when there is no such task."""
        ...

    def taint(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        """Mark a task and its attempt as tainted by these sources; True when the attempt was not tainted before."""
        ...

    def fail_run(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        """Fail the attempt; the retry policy decides what follows. Does nothing when its lease has ended."""
        ...

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        """The facts of a lease of the task, live or not."""
        ...

    def lease_states(self, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """The states of these leases, without renewing any."""
        ...

    def renew_one(self, task_id: str, lease_id: str) -> None:
        """Renew a lease because its run called the gateway or a tool."""
        ...

    def spent(
        self, task_id: str, lease_id: str, *, input_tokens: int, output_tokens: int, cost_usd: float | None = None
    ) -> None:
        """Record the usage of one call of the gateway under this lease, live or not. The cost is null without a price.

        Call it once per call. Does nothing when the task or the lease is gone.
        """
        ...

    def queue_figures(self) -> QueueFigures:
        """The depth and age of the queue."""
        ...
