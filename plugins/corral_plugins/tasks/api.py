"""What other plugins may know of tasks: shapes and the service `Tasks`."""

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
"""What a waiting claim listens to: one of these rings whenever something may have become claimable.

`system.alert` tells of the kill switch.
"""
SIGNAL_TOPICS = ("task.updated", "task.cancelled", "task.failed", "task.completed", "task.retried")
"""What a waiting `signals` call listens to: one of these rings with every new signal."""

Priority = Literal["low", "medium", "high", "critical"]
ToolName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:/-]+(?![\s\S])")]
Kind = Literal["error", "timeout", "lease_lost", "stalled"]


class RetryPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a failed attempt is followed by another: delay = min(max, initial x factor^(n-1)), +- jitter."""

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
    """When a running attempt counts as stalled, and what is done then. `stall_seconds` 0: never."""

    stall_seconds: Annotated[int, Meta(ge=0, le=86400)] = 900
    loop_repeats: Annotated[int, Meta(ge=2, le=50)] = 6
    action: Literal["notify", "cancel", "retry"] = "notify"


class ReviewPolicy(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Who reviews a result before the task is completed."""

    mode: Literal["none", "human", "agent"] = "none"
    reviewer_agent_id: Id | None = None


class TaskFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an owner may set, beside the title."""

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
    """What a task belongs to, when it is not simply its creator's."""

    parent_task_id: str | None = None
    cause_chain: tuple[str, ...] = ()
    workflow_run_id: str | None = None
    step_run_id: str | None = None
    tainted: bool = False


DIRECT = Origin()


class LeaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lease as a worker names it."""

    task_id: Annotated[str, msgspec.Meta(max_length=36)]
    lease_id: Annotated[str, msgspec.Meta(max_length=36)]


class LeaseState(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told of a lease. `state`: ok | lost | cancel_requested | budget_warning."""

    task_id: str
    lease_id: str
    state: str
    expires_at: str | None
    reason: str | None = None


class LeaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Whose a lease is or was. `is_live`: it has not ended."""

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
    """Something that a worker should hear at once. `state`: lost | cancel_requested."""

    seq: int
    task_id: str
    lease_id: str
    state: str


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed task with all that a worker needs to run it (`workers.md` of the documentation: claim)."""

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
    """A run under its live lease, as those judge it who do something for it. `allowed_tools` None: all.

    Of a task that is not leased `lease_id`, `worker_id` and, unless it names one, `agent_id` are empty.
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
    """How much waits: `depth` pending tasks, the age of the oldest in milliseconds."""

    depth: int
    oldest_pending_ms: int | None


class Tasks(Protocol):
    """Joins the caller's unit. Every transition is one guarded update; the loser raises `Conflict`."""

    def create(
        self, new: NewTask, *, by: Principal, source: dict[str, Any] | None = None, origin: Origin = DIRECT
    ) -> Any:
        """Create; returns the `TaskView`. `source` is `{type, id}`, by default the caller."""
        ...

    def get(self, task_id: str, *, by: Principal) -> Any:
        """The `TaskView`; `NotFound` when absent or invisible."""
        ...

    def cancel(self, task_id: str, *, by: Principal, reason: str | None = None) -> Any:
        """Cancel; returns the `TaskView`, `cancelled` or `cancelling`."""
        ...

    def reopen(self, task_id: str, *, by: Principal, source: str, reason: str | None = None) -> Any:
        """Try a failed or cancelled task again under its id. `source`: person | dead_letter. Returns the `TaskView`."""
        ...

    def resume(self, task_id: str, *, kind: str, given: dict[str, Any]) -> bool:
        """A waiting task has what it waited for: back to the queue with it; False: it does not wait for that."""
        ...

    def claim(self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None) -> ClaimAnswer:
        """Lease up to `max_tasks` to this worker; `tasks` is empty when nothing is claimable, with the reason."""
        ...

    def claimable(self, worker_id: str, *, limit: int) -> list[Any]:
        """What `claim` would take now, in order; changes nothing."""
        ...

    def renew(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """Renew the listed leases of this worker and tell the state of each."""
        ...

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        """Its live leases."""
        ...

    def signals(self, worker_id: str, *, after: int) -> list[Signal]:
        """What it has to hear, oldest first, at most 200."""
        ...

    def release_worker(self, worker_id: str, *, reason: str) -> int:
        """End every live lease of a worker without using an attempt; how many."""
        ...

    def release_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        """End every live lease of an agent at once: to `pending` without using an attempt, or cancelled; the ids."""
        ...

    def cancel_leased(self, *, reason: str) -> int:
        """The kill switch in mode `cancel`: request the cancellation of every leased task; how many.

        The first are asked in this unit, the rest by a job.
        """
        ...

    def detach_agent(self, agent_id: str) -> int:
        """An agent is deleted: its waiting tasks lose their `agent_id`; how many."""
        ...

    def live_tasks(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        """Ids of the tasks that each agent holds a live lease of."""
        ...

    def live_lease(self, task_id: str, lease_id: str) -> LeaseView | None:
        """The lease if it is the live one of the task; for the gateway and tools, which check before and after."""
        ...

    def run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        """The started run of this lease, its task locked; a sign of life.

        `Conflict(lease_lost)` when the lease is not the live one, `Forbidden` when it is not the caller's.
        """
        ...

    def run_of(self, task_id: str) -> Run | None:
        """The run of a task as it is, not locked; None: no such task."""
        ...

    def taint(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        """Task and attempt have received untrusted content of these sources; True: the attempt had none before."""
        ...

    def fail_run(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        """The attempt failed; the retry policy decides what follows. Nothing happens when its lease has ended."""
        ...

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        """A lease of the task, live or not; for those who write down what a run has used."""
        ...

    def lease_states(self, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        """The state of each, without renewing any; for the gateway, which ends calls with their lease."""
        ...

    def renew_one(self, task_id: str, lease_id: str) -> None:
        """A sign of life from the gateway or a tool."""
        ...

    def spent(
        self, task_id: str, lease_id: str, *, input_tokens: int, output_tokens: int, cost_usd: float | None = None
    ) -> None:
        """One call of the gateway under this lease, live or not, has used so much; without a price the cost is unknown.

        Nothing happens when the task or the lease is gone. Call it once a call.
        """
        ...

    def queue_figures(self) -> QueueFigures:
        """For the fleet overview."""
        ...
