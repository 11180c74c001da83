"""The public API of the `workflows` plugin: step types, the `Workflows` service, events and error codes.

A step type is either executed or dispatched. `execute` does the work of the step in an asyncio task, outside units of
work and under a lease. `dispatch` runs in the transaction that starts the step, and returns either a result or a
`StepWait`, which names the object that the step waits for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import ExpectedFailure, FieldError, declare_codes
from corral.events.event import Event
from corral.events.log import LoggedEvent

declare_codes(
    {
        "cycle": (422, "The dependencies form a cycle", "Remove the dependency that leads back to the object itself."),
    }
)

Json = dict[str, Any]
StepStatus = Literal["pending", "ready", "running", "waiting", "completed", "failed", "skipped", "cancelled"]
RunStatus = Literal["queued", "running", "waiting", "paused", "completed", "failed", "cancelled"]


class StepContext(msgspec.Struct, frozen=True, kw_only=True):
    """The data about a step that its step type receives.

    `config` is the configuration of the step with all expressions evaluated. `caller` has the current rights of the
    person who started the run. `idempotency_key` is the same for every attempt of the step. `remaining_usd` is the
    amount that the run may still spend, or None if the run has no limit. `work` lets `execute` open units of work.
    `with_secrets(host)` returns the configuration with the values of its secrets, which may be sent only to that host.
    In `resolve` and `cancel`, `waits_for` is the id of the object that the step waits for.
    """

    run_id: str
    workflow_id: str
    step_run_id: str
    name: str
    title: str
    iteration: tuple[int, ...]
    attempt: int
    idempotency_key: str
    config: Json
    agent_id: str | None
    retry_policy: Json | None
    timeout_seconds: int | None
    depth: int
    caller: Principal
    tainted: bool
    cause_chain: tuple[str, ...]
    remaining_usd: float | None
    work: Work
    review_policy: Json | None = None  # that of the workflow, for the tasks of its steps
    waits_for: str | None = None
    with_secrets: Callable[[str], Awaitable[Json]] | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The final result of a step.

    `status` may be `skipped`, with a `reason`. `goto` is the name of a later step that runs next, even if the steps
    before it were skipped or have failed. `error` has the fields `kind`, `type` and `message`. A failed step is retried
    if `retryable` is true and its retry policy allows another attempt. `tainted` marks output that comes from an
    untrusted source.
    """

    status: Literal["completed", "failed", "skipped", "cancelled"] = "completed"
    output: Any = None
    error: Json | None = None
    retryable: bool = False
    reason: str | None = None
    goto: str | None = None
    cost_usd: float = 0.0
    tainted: bool = False


class StepWait(msgspec.Struct, frozen=True, kw_only=True):
    """Says which object a dispatched step waits for.

    `waits_for` is the id of an object, such as a task. If the object is a task, an approval or a run, the events about
    its end are passed to `resolve`. For any other object, the plugin that owns the object calls `Workflows.end_step`. A
    step that waits for a person, a time or an event has the status `waiting`. A step whose work is done elsewhere, for
    example by a task, has the status `running`. If `person` is set, the waiting time does not count against the run's
    time limit. If the step has not ended by `until`, it fails.
    """

    waits_for: str
    status: Literal["running", "waiting"] = "running"
    person: bool = False
    until: str | None = None


class StepFailure(ExpectedFailure):
    """The failure of a step. `type` is a stable identifier, and `message` is a sentence for people."""

    def __init__(self, type: str, message: str, *, kind: str = "error", retryable: bool = True) -> None:
        self.type, self.message, self.kind, self.retryable = type, message, kind, retryable
        super().__init__(f"{type}: {message}")


class StepType(msgspec.Struct, frozen=True, kw_only=True):
    """A step type that a plugin contributes with the `corral_workflow_steps` hook.

    `schema` is the JSON Schema of the configuration with all expressions evaluated. Exactly one of `execute` and
    `dispatch` is set.

    `execute(context)` returns the output or a `StepResult`. It raises `StepFailure` or a `Problem` if the step fails.
    If the process dies, `execute` is called again, so it must send `context.idempotency_key` with each request.

    `dispatch(context)` runs in the unit of work that starts the step. `resolve(context, event)` runs in a unit of work
    and receives an event about the object that the step waits for. It returns the result of the step, or None if the
    step has not ended. `cancel(context, reason)` runs in a unit of work and cancels the work that is done elsewhere,
    such as a task. It returns whether that work has already ended. If not, `resolve` later receives the event about the
    end of the work.

    When a workflow is saved, `check(config)` returns additional errors in a configuration. The pointers of the errors
    are relative to the configuration. `gotos(config)` returns the names of the later steps to which the step can jump,
    keyed by the JSON pointer to the name. `own_retries` means that the object that does the work, and not the workflow,
    applies the retry policy. `secrets` allows `{{ secrets.NAME }}` in the configuration. Such a reference is kept as
    text until `execute` asks for the value.
    """

    type: str
    title: str
    schema: Json
    output_schema: Json | None = None
    execute: Callable[[StepContext], Awaitable[Any]] | None = None
    dispatch: Callable[[StepContext], StepResult | StepWait] | None = None
    resolve: Callable[[StepContext, LoggedEvent], StepResult | None] | None = None
    cancel: Callable[[StepContext, str | None], bool] | None = None
    check: Callable[[Json], list[FieldError]] | None = None
    gotos: Callable[[Json], Mapping[str, str]] | None = None
    waits: bool = False
    own_retries: bool = False
    secrets: bool = False


class StepTasks(Protocol):
    """Creates the tasks that do the work of steps. Every method runs in the caller's unit of work.

    If the work of a step type is done by a task, the `resolve` and `cancel` functions of the step type call the methods
    of the same names in this class. The step type also sets `own_retries`, because the task applies the retry policy of
    the step.
    """

    def create(self, context: StepContext, fields: Json) -> StepWait:
        """Create a task with the given fields for a step. Return a `StepWait` that makes the step wait for the task.

        The task belongs to the person who started the run. Its cost limit is at most the amount that the run may still
        spend. Raise `StepFailure` if the person is not allowed to create tasks.
        """
        ...

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """End the step if its task has ended. The result of the task becomes the result of the step.

        Return None if the event is not about the end of the task.
        """
        ...

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the task, and return whether it has ended.

        A running task does not end until its worker has stopped.
        """
        ...


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The data needed to start a run.

    `tainted` means that the input comes from an untrusted source. `cause_chain` lists the ids of
    the triggers and tasks that led to the run. It is passed on to everything that the run starts.
    """

    workflow_id: str
    input: Any = msgspec.field(default_factory=dict)
    context: Json = msgspec.field(default_factory=dict)
    tags: Sequence[str] = ()
    trigger_type: str = "manual"
    trigger_id: str | None = None
    tainted: bool = False
    cause_chain: tuple[str, ...] = ()
    parent_run_id: str | None = None
    depth: int = 0


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a run. `output` is null until the run is completed.

    `tainted` means that the output may contain content from an untrusted source. `cause_chain` lists the
    ids of the triggers and tasks that led to the run.
    """

    id: str
    workflow_id: str
    status: RunStatus
    output: Any
    error: Json | None
    cost_usd: float
    tainted: bool = False
    cause_chain: tuple[str, ...] = ()


class Workflows(Protocol):
    """The service for workflow runs. Every method runs in the caller's unit of work."""

    def start(self, request: RunRequest, *, by: Principal) -> RunFacts:
        """Start a run with the rights of the person whom `by` represents.

        Raise `NotFound` if the workflow does not exist, `Conflict` if the workflow cannot run, `Invalid` with the code
        `schema_mismatch` if the input does not match the input schema, `Unavailable` with the code `kill_switch` while
        the kill switch is engaged, or `TooMany` with the code `concurrency_limit` if the workflow has reached its limit
        of active runs and is configured to skip further runs. Also raise `Invalid` if `request.depth` exceeds the
        setting `workflows.max_depth`.
        """
        ...

    def find_run(self, run_id: str) -> RunFacts | None:
        """Return the state of a run, or None if the run does not exist."""
        ...

    def active_runs(self, *, trigger_id: str) -> list[str]:
        """Return the ids of at most 1,000 unfinished runs that this trigger started, oldest first."""
        ...

    def cancel(self, run_id: str, *, reason: str | None = None) -> None:
        """Cancel a run. The method does nothing if the run has ended."""
        ...

    def end_step(self, waits_for: str, result: StepResult) -> bool:
        """End the step that waits for an object of the calling plugin. Return False if no step waits for the object."""
        ...

    def exists(self, workflow_id: str) -> bool:
        """Return whether a workflow with this id exists and is not deleted."""
        ...


class WorkflowEvent(Event, kw_only=True):
    """The fields that all events about a workflow share."""

    area = "workflows"

    workflow_id: str
    name: str


class WorkflowCreated(WorkflowEvent, kw_only=True):
    """A workflow was created."""

    event = "workflow.created"


class WorkflowUpdated(WorkflowEvent, kw_only=True):
    """A workflow was changed. `workflow_version` is the version number of its newest definition."""

    event = "workflow.updated"

    workflow_version: int


class WorkflowDeleted(WorkflowEvent, kw_only=True):
    """A workflow was deleted."""

    event = "workflow.deleted"


class RunEvent(Event, kw_only=True):
    """The fields that all events about a run share."""

    area = "workflows"

    run_id: str
    workflow_id: str
    workflow_version: int
    status: str
    trigger: dict[str, str | None]


class RunCreated(RunEvent, kw_only=True):
    """A workflow run was created."""

    event = "workflow.run.created"


class RunStarted(RunEvent, kw_only=True):
    """A workflow run started."""

    event = "workflow.run.started"


class RunWaiting(RunEvent, kw_only=True):
    """A workflow run started waiting for a person, a time or an event."""

    event = "workflow.run.waiting"


class RunPaused(RunEvent, kw_only=True):
    """A person paused a workflow run."""

    event = "workflow.run.paused"


class RunResumed(RunEvent, kw_only=True):
    """A workflow run continues after a pause or after a failure."""

    event = "workflow.run.resumed"


class RunCompleted(RunEvent, kw_only=True):
    """A workflow run was completed."""

    event = "workflow.run.completed"


class RunFailed(RunEvent, kw_only=True):
    """A workflow run failed. `name` is the name of the workflow."""

    event = "workflow.run.failed"

    name: str
    error: dict[str, Any]


class RunCancelled(RunEvent, kw_only=True):
    """A workflow run was cancelled."""

    event = "workflow.run.cancelled"

    reason: str | None


class StepEvent(Event, kw_only=True):
    """The fields that all events about a step of a run share."""

    area = "workflows"

    run_id: str
    workflow_id: str
    workflow_version: int
    step: str
    iteration: list[int]
    status: str
    output_summary: str | None = None
    error: dict[str, Any] | None = None


class StepStarted(StepEvent, kw_only=True):
    """A step of a workflow run started."""

    event = "step.started"


class StepWaiting(StepEvent, kw_only=True):
    """A step of a workflow run started waiting for a person, a time or an event."""

    event = "step.waiting"


class StepCompleted(StepEvent, kw_only=True):
    """A step of a workflow run was completed."""

    event = "step.completed"


class StepFailed(StepEvent, kw_only=True):
    """A step of a workflow run failed."""

    event = "step.failed"


class StepSkipped(StepEvent, kw_only=True):
    """A step of a workflow run was skipped."""

    event = "step.skipped"


EVENTS: tuple[type[Event], ...] = (
    WorkflowCreated,
    WorkflowUpdated,
    WorkflowDeleted,
    RunCreated,
    RunStarted,
    RunWaiting,
    RunPaused,
    RunResumed,
    RunCompleted,
    RunFailed,
    RunCancelled,
    StepStarted,
    StepWaiting,
    StepCompleted,
    StepFailed,
    StepSkipped,
)
