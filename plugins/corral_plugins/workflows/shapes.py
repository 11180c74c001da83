"""The request and response bodies of the workflow routes."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, Tags, line, text_format
from corral_plugins.tasks.api import RetryPolicy, ReviewPolicy
from corral_plugins.workflows.api import RunStatus, StepStatus

Json = dict[str, Any]
Status = Literal["draft", "active", "archived"]
WorkflowName = Annotated[str, line(200)]
Description = Annotated[str, Meta(max_length=4000)]
StepTitle = Annotated[str, line(200)]
StepName = Annotated[
    str,
    text_format(
        r"^[a-z][a-z0-9_]{0,62}(?![\s\S])",
        "the name of a step: 1 to 63 characters of a-z, 0-9 and _, beginning with a letter",
    ),
]
StepRef = Annotated[str, line(200)]
Expression = Annotated[str, Meta(min_length=1, max_length=4096)]
StepTypeName = Annotated[
    str,
    text_format(
        r"^[a-z][a-z0-9_.]{0,59}(?![\s\S])",
        "the type of a step: 1 to 60 characters of a-z, 0-9, _ and ., beginning with a letter",
        examples=["transform"],
    ),
]
RunIf = Literal["success", "all_success", "all_done", "any_success", "any_failed", "always"]
OnError = Annotated[
    str,
    text_format(
        r"^(fail|continue|pause|goto:[a-z][a-z0-9_]{0,62})(?![\s\S])",
        "fail, continue, pause, or goto: and the name of a step, such as goto:cleanup",
    ),
]
Seconds = Annotated[int, Meta(ge=1, le=2_592_000)]
Iteration = Annotated[list[Annotated[int, Meta(ge=0, le=1000)]], Meta(max_length=5)]


class Concurrency(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The maximum number of active runs of a workflow, and the policy for further runs once that number is reached."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | None = None
    on_limit: Literal["queue", "skip", "cancel_running"] = "queue"


class WorkflowConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The configuration of a workflow.

    `output` is a JSON value that may contain expressions. The step `on_failure_step` runs only if a run fails. With
    `fail_fast`, a failed step cancels the steps that are still running.
    """

    input_schema: Json | None = None
    output: Any = None
    timeout_seconds: Annotated[int, Meta(ge=60, le=2_592_000)] | UnsetType = UNSET
    concurrency: Concurrency | None = None
    max_parallel: Annotated[int, Meta(ge=1, le=100)] | UnsetType = UNSET
    fail_fast: bool = False
    on_failure_step: StepName | None = None
    max_cost_usd: Annotated[float, Meta(ge=0, le=1_000_000_000)] | None = None
    review_policy: ReviewPolicy | None = None


class StepFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of a step, except its name and its type.

    `depends_on` lists the names or ids of steps. If it is null, the step depends on all steps with the next lower
    `order`.
    """

    order: Annotated[int, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    config: Json | UnsetType = UNSET
    agent_id: Id | UnsetType | None = UNSET
    depends_on: Annotated[list[StepRef], Meta(max_length=200)] | UnsetType | None = UNSET
    run_if: RunIf | UnsetType = UNSET
    when: Expression | UnsetType | None = UNSET
    retry_policy: RetryPolicy | UnsetType | None = UNSET
    timeout_seconds: Seconds | UnsetType | None = UNSET
    on_error: OnError | UnsetType = UNSET


class NewStep(StepFields, kw_only=True):
    """The fields for creating a step.

    If `name` contains characters other than a-z, 0-9 and _, it is used as the title, and the name is derived from it.
    """

    name: StepTitle
    step_type: StepTypeName
    title: StepTitle | UnsetType = UNSET


class StepPatch(StepFields, kw_only=True):
    """The step fields to change. Absent fields stay unchanged."""

    name: StepTitle | UnsetType = UNSET
    title: StepTitle | UnsetType = UNSET
    step_type: StepTypeName | UnsetType = UNSET


class StepView(msgspec.Struct, kw_only=True):
    """A step of a workflow. `depends_on` contains the names of steps."""

    id: str
    name: str
    title: str
    step_type: str
    order: int
    config: Json
    agent_id: str | None
    depends_on: list[str] | None
    run_if: RunIf
    when: str | None
    retry_policy: Json | None
    timeout_seconds: int | None
    on_error: str


class NewWorkflow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating a workflow."""

    name: WorkflowName
    description: Description = ""
    is_template: bool = False
    status: Status = "active"
    config: WorkflowConfig = msgspec.field(default_factory=WorkflowConfig)
    steps: Annotated[list[NewStep], Meta(max_length=1000)] = []
    tags: Tags = []


class WorkflowPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The workflow fields to change. Absent fields stay unchanged; `config` and `steps` are replaced as a whole."""

    name: WorkflowName | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    is_template: bool | UnsetType = UNSET
    status: Status | UnsetType = UNSET
    config: WorkflowConfig | UnsetType = UNSET
    steps: Annotated[list[NewStep], Meta(max_length=1000)] | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET


class LastRun(msgspec.Struct, kw_only=True):
    """The newest run of a workflow."""

    id: str
    status: RunStatus
    created_at: Instant
    finished_at: Instant | None


class WorkflowItem(msgspec.Struct, kw_only=True):
    """A workflow in a list. `workflow_version` is the version number of its newest definition."""

    id: str
    version: int
    workflow_version: int
    created_by: str | None
    created_at: Instant
    updated_at: Instant
    name: str
    description: str
    is_template: bool
    status: Status
    config: Json
    tags: list[str]
    step_count: int
    last_run: LastRun | None


class WorkflowView(WorkflowItem, kw_only=True):
    """A workflow with all its steps, in order."""

    steps: list[StepView]


class WorkflowQuery(PageQuery, kw_only=True):
    """The filters for listing workflows."""

    status: list[Status] | UnsetType = UNSET
    is_template: bool | UnsetType = UNSET
    search: Annotated[str, line(200)] | UnsetType = UNSET
    tag: list[Annotated[str, line(64)]] | UnsetType = UNSET


class DeleteWorkflowQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for deleting a workflow. `force` cancels its active runs."""

    force: bool = False


class CloneWorkflow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of the copy, and whether the copy is a template."""

    name: WorkflowName
    is_template: bool = False


class VersionQuery(PageQuery, kw_only=True):
    """Selects a page of the list of versions. The newest version comes first."""


class WorkflowVersionItem(msgspec.Struct, kw_only=True):
    """A version of a workflow, as shown in the list of versions."""

    n: int
    name: str
    step_count: int
    by: str | None
    at: Instant


class WorkflowVersionView(WorkflowVersionItem, kw_only=True):
    """A version of a workflow, with its definition."""

    config: Json
    steps: list[StepView]


class RollBackWorkflow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request to roll back a workflow: the number of the earlier version to restore."""

    version: Annotated[int, Meta(ge=1)]


class ValidateWorkflow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request to validate a workflow. If `input` is given, it is checked against the input schema."""

    input: Any | UnsetType = UNSET


class StepFault(msgspec.Struct, kw_only=True):
    """An error in a workflow. `step` is the name of the affected step, or null if the error is not in a step."""

    step: str | None
    pointer: str
    code: str
    detail: str


class PlannedStep(msgspec.Struct, kw_only=True):
    """A step in the order of execution. Steps with the same `stage` may run at the same time."""

    stage: int
    name: str
    step_type: str
    depends_on: list[str]
    run_if: RunIf


class Validation(msgspec.Struct, kw_only=True):
    """The result of validating a workflow.

    `warnings` names agents, tools and secrets that do not currently exist, tools that no agent may use for the step
    that needs them, and agent steps without instructions. It also reports a workflow that has no steps.
    """

    valid: bool
    errors: list[StepFault]
    warnings: list[StepFault]
    plan: list[PlannedStep]


class StepTypeView(msgspec.Struct, kw_only=True):
    """A step type. `waits` means that steps of this type wait for a person, a time or an event."""

    type: str
    title: str
    plugin: str
    schema: Json
    output_schema: Json | None
    waits: bool


class StepTypeList(msgspec.Struct, kw_only=True):
    """All step types, sorted by name."""

    items: list[StepTypeView]


class RunWorkflow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for running a workflow. With `dry_run`, no step is run, and the response contains the plan."""

    input: Any = msgspec.field(default_factory=dict)
    dry_run: bool = False
    context: Json = {}
    tags: Tags = []


class Missing(msgspec.Struct, kw_only=True):
    """The objects that a workflow refers to but that do not exist or are not available."""

    secrets: list[str]
    tools: list[str]
    agents: list[str]


class DryRun(msgspec.Struct, kw_only=True):
    """The plan of a run.

    `estimated_cost_usd` is the average cost of the newest completed runs, or null if there are none.
    """

    plan: list[PlannedStep]
    missing: Missing
    estimated_cost_usd: float | None


class Trigger(msgspec.Struct, kw_only=True):
    """The cause of a run.

    `type` is `manual`, `workflow` or the type of a trigger. `id` is the id of the trigger, or null if there is none.
    """

    type: str
    id: str | None


class RunItem(msgspec.Struct, kw_only=True):
    """A run in a list."""

    id: str
    workflow_id: str
    workflow_version: int
    number: int
    status: RunStatus
    tags: list[str]
    trigger: Trigger
    started_by: str | None
    retry_of: str | None
    parent_run_id: str | None
    depth: int
    error: Json | None
    cost_usd: float
    cancel_requested_at: Instant | None
    created_at: Instant
    started_at: Instant | None
    finished_at: Instant | None


class StepAttemptView(msgspec.Struct, kw_only=True):
    """A failed attempt of a step."""

    attempt: int
    started_at: Instant | None
    ended_at: Instant
    error: Json | None


class StepRunView(msgspec.Struct, kw_only=True):
    """A step of a run. `iteration` contains the index in each enclosing loop."""

    id: str | None
    name: str
    step_type: str
    iteration: list[int]
    status: StepStatus
    reason: str | None
    input: Any
    output: Any
    error: Json | None
    task_id: str | None
    approval_id: str | None
    child_run_id: str | None
    attempt: int
    attempts: list[StepAttemptView]
    reused: bool
    cost_usd: float
    started_at: Instant | None
    finished_at: Instant | None


class Definition(msgspec.Struct, kw_only=True):
    """The definition that a run started with."""

    name: str
    config: Json
    steps: list[StepView]


class RunView(RunItem, kw_only=True):
    """A run with its steps.

    `steps` contains at most the first 1,000 steps, and `step_count` is the total number of steps.
    """

    definition: Definition
    input: Any
    output: Any
    context: Json
    current_steps: list[str]
    steps: list[StepRunView]
    step_count: int


class RunQuery(PageQuery, kw_only=True):
    """The filters for listing runs. `since` is the earliest creation time."""

    status: list[RunStatus] | UnsetType = UNSET
    trigger_id: list[Id] | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET


class AllRunsQuery(RunQuery, kw_only=True):
    """The filters for listing the runs of all workflows."""

    workflow_id: list[Id] | UnsetType = UNSET


class GetRunQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The options for reading a run. `wait` is the maximum number of seconds to wait for the end of the run."""

    wait: Annotated[int, Meta(ge=0, le=55)] = 0

    @functools.cached_property
    def poll_deadline(self) -> float:
        """The time at which the long poll ends, in seconds since the epoch.

        The value is set on first use and then kept, because the handler runs again for every notification.
        """
        return clock.time_s() + self.wait


class RunEventQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Selects events of a run. `after` is the `seq` or the id of an event; only later events are returned."""

    after: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class CancelRun(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The reason for a cancellation."""

    reason: Annotated[str, line(500, 0)] | None = None


class RetryRun(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options for repeating a run: where the new run begins, and which definition it uses.

    `from` is `failed`, `start` or the name of a step.
    """

    start: StepName = msgspec.field(name="from", default="failed")
    definition: Literal["original", "current"] = "original"


class ResolveStep(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A person's decision about a step that is waiting after a failure.

    If the step is skipped, `output` becomes its output.
    """

    action: Literal["retry", "skip", "abort"]
    output: Any = None
    iteration: Iteration = []


class SubmitInput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The data that a step of the type `input` asks for."""

    input: Any
    iteration: Iteration = []
