"""The database tables for workflows, their versions, their runs and the steps of these runs."""

from __future__ import annotations

from typing import Any

import peewee

from corral import clock
from corral.database.model import SHARED, IdField, InstantField, JSONField, Model


class Workflow(Model):
    """A workflow. `n` is the version number of its newest definition, which is also stored as a `WorkflowVersion`."""

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    version = peewee.IntegerField(default=1)
    n = peewee.IntegerField(default=1)
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    name = peewee.CharField(max_length=200)
    description = peewee.TextField(default="")
    is_template = peewee.BooleanField(default=False)
    status = peewee.CharField(max_length=10, default="active")
    config = JSONField()
    steps = JSONField()
    step_count = peewee.IntegerField(default=0)
    tags = JSONField(default=list)
    runs = peewee.IntegerField(default=0)
    last_run_id = IdField(null=True)
    deleted_at = InstantField(null=True)

    class Meta:
        table_name = "workflows_workflows"
        indexes = ((("created_at", "id"), False),)


LIVING = Workflow.deleted_at.is_null()


class WorkflowVersion(Model):
    """Definition `n` of a workflow: its configuration and its steps.

    A definition never changes, because runs refer to it.
    """

    visibility = SHARED
    owner_field = "created_by"

    id = IdField(primary_key=True)
    workflow_id = IdField()
    n = peewee.IntegerField()
    name = peewee.CharField(max_length=200)
    config = JSONField()
    steps = JSONField()
    created_by = IdField(null=True)
    created_at = InstantField()

    class Meta:
        table_name = "workflows_versions"
        indexes = ((("workflow_id", "n"), True),)


class Run(Model):
    """A run of a workflow.

    Every change to a run or to one of its steps increments `revision`, so that changes computed from outdated rows are
    not written. `queued_at` is the time at which a job to advance the run was queued, or an empty string if no job is
    queued. `due_at` is the time at which the next timer expires or the last job counts as lost. The sweep then queues
    another job. `failure` is the first failure that ends the run. `stop` is the request to cancel the run, or the limit
    that the run has exceeded. In both cases, the run ends only when its running steps have ended.
    """

    visibility = SHARED
    owner_field = "started_by"

    id = IdField(primary_key=True)
    workflow_id = IdField()
    n = peewee.IntegerField()
    number = peewee.IntegerField()
    revision = peewee.IntegerField(default=0)
    status = peewee.CharField(max_length=10, default="queued")
    input = JSONField(null=True)
    output = JSONField(null=True)
    context = JSONField(default=dict)
    tags = JSONField(default=list)
    trigger_type = peewee.CharField(max_length=20)
    trigger_id = IdField(null=True)
    started_by = IdField(null=True)
    retry_of = IdField(null=True)
    parent_run_id = IdField(null=True, index=True)
    depth = peewee.IntegerField(default=0)
    tainted = peewee.BooleanField(default=False)
    cause = JSONField(default=list)
    error = JSONField(null=True)
    failure = JSONField(null=True)
    stop = JSONField(null=True)
    paused = peewee.BooleanField(default=False)
    cost_micro = peewee.BigIntegerField(default=0)
    queued_at = InstantField(default="")
    due_at = InstantField(default=clock.LAST)
    deadline_at = InstantField(null=True)
    people_since = InstantField(null=True)
    cancel_requested_at = InstantField(null=True)
    created_at = InstantField()
    started_at = InstantField(null=True)
    finished_at = InstantField(null=True)

    class Meta:
        table_name = "workflows_runs"
        indexes = (
            (("created_at", "id"), False),
            (("workflow_id", "created_at", "id"), False),
            (("status", "workflow_id", "id"), False),
            (("due_at",), False),
            (("trigger_id", "status", "id"), False),
        )


class StepRun(Model):
    """A step of a run, or of an iteration of a loop.

    `key` identifies the step within the run: its name, followed by the index in each enclosing loop. `report` is the
    result of the step as reported by its executor, an event or a person; the engine applies it when it next
    advances the run. `lease` is the token of the process that executes the step. `waits_for` is the object whose events
    end the step.
    """

    visibility = SHARED

    id = IdField(primary_key=True)
    run_id = IdField()
    key = peewee.CharField(max_length=120)
    name = peewee.CharField(max_length=63)
    iteration = JSONField(default=list)
    status = peewee.CharField(max_length=10)
    reason = peewee.CharField(max_length=500, null=True)
    type = peewee.CharField(max_length=60)
    input = JSONField(null=True)
    output = JSONField(null=True)
    error = JSONField(null=True)
    report = JSONField(null=True)
    attempt = peewee.IntegerField(default=1)
    attempts = JSONField(default=list)
    goto = peewee.CharField(max_length=63, null=True)
    reused = peewee.BooleanField(default=False)
    person = peewee.BooleanField(default=False)
    waits_for = IdField(null=True)
    event = peewee.CharField(max_length=100, null=True)
    cursor = peewee.BigIntegerField(null=True)
    lease = IdField(null=True)
    lease_until = InstantField(null=True)
    wake_at = InstantField(null=True)
    cost_micro = peewee.BigIntegerField(default=0)
    created_at = InstantField()
    started_at = InstantField(null=True)
    finished_at = InstantField(null=True)

    class Meta:
        table_name = "workflows_step_runs"
        indexes = ((("run_id", "key"), True),)


StepRun.add_index(
    peewee.ModelIndex(
        StepRun, (StepRun.waits_for,), where=StepRun.waits_for.is_null(False), name="workflows_step_runs_waits_for"
    )
)
StepRun.add_index(
    peewee.ModelIndex(
        StepRun, (StepRun.lease_until,), where=StepRun.lease.is_null(False), name="workflows_step_runs_leases"
    )
)
StepRun.add_index(
    peewee.ModelIndex(
        StepRun, (StepRun.event, StepRun.id), where=StepRun.event.is_null(False), name="workflows_step_runs_events"
    )
)


def fetch_tuples(query: Any) -> list[tuple[Any, ...]]:
    """Execute a query and return its rows as tuples."""
    return list(query.tuples())
