"""Creates the tables for workflows, their versions, their runs and the steps of these runs."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField, BooleanField, CharField, IntegerField, Model, ModelIndex, TextField


def up(migrator: Any, db: Any) -> None:
    class Workflow(Model):
        id = CharField(primary_key=True, max_length=36)
        version = IntegerField()
        n = IntegerField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        name = CharField(max_length=200)
        description = TextField()
        is_template = BooleanField()
        status = CharField(max_length=10)
        config = TextField()
        steps = TextField()
        step_count = IntegerField()
        tags = TextField()
        runs = IntegerField()
        last_run_id = CharField(max_length=36, null=True)
        deleted_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workflows_workflows"
            indexes = ((("created_at", "id"), False),)

    class WorkflowVersion(Model):
        id = CharField(primary_key=True, max_length=36)
        workflow_id = CharField(max_length=36)
        n = IntegerField()
        name = CharField(max_length=200)
        config = TextField()
        steps = TextField()
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workflows_versions"
            indexes = ((("workflow_id", "n"), True),)

    class Run(Model):
        id = CharField(primary_key=True, max_length=36)
        workflow_id = CharField(max_length=36)
        n = IntegerField()
        number = IntegerField()
        revision = IntegerField()
        status = CharField(max_length=10)
        input = TextField(null=True)
        output = TextField(null=True)
        context = TextField()
        tags = TextField()
        trigger_type = CharField(max_length=20)
        trigger_id = CharField(max_length=36, null=True)
        started_by = CharField(max_length=36, null=True)
        retry_of = CharField(max_length=36, null=True)
        parent_run_id = CharField(max_length=36, null=True, index=True)
        depth = IntegerField()
        tainted = BooleanField()
        cause = TextField()
        error = TextField(null=True)
        failure = TextField(null=True)
        stop = TextField(null=True)
        paused = BooleanField()
        cost_micro = BigIntegerField()
        queued_at = CharField(max_length=24)
        due_at = CharField(max_length=24)
        deadline_at = CharField(max_length=24, null=True)
        people_since = CharField(max_length=24, null=True)
        cancel_requested_at = CharField(max_length=24, null=True)
        created_at = CharField(max_length=24)
        started_at = CharField(max_length=24, null=True)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workflows_runs"
            indexes = (
                (("created_at", "id"), False),
                (("workflow_id", "created_at", "id"), False),
                (("status", "workflow_id", "id"), False),
                (("due_at",), False),
                (("trigger_id", "status", "id"), False),
            )

    class StepRun(Model):
        id = CharField(primary_key=True, max_length=36)
        run_id = CharField(max_length=36)
        key = CharField(max_length=120)
        name = CharField(max_length=63)
        iteration = TextField()
        status = CharField(max_length=10)
        reason = CharField(max_length=500, null=True)
        type = CharField(max_length=60)
        input = TextField(null=True)
        output = TextField(null=True)
        error = TextField(null=True)
        report = TextField(null=True)
        attempt = IntegerField()
        attempts = TextField()
        goto = CharField(max_length=63, null=True)
        reused = BooleanField()
        person = BooleanField()
        waits_for = CharField(max_length=36, null=True)
        event = CharField(max_length=100, null=True)
        cursor = BigIntegerField(null=True)
        lease = CharField(max_length=36, null=True)
        lease_until = CharField(max_length=24, null=True)
        wake_at = CharField(max_length=24, null=True)
        cost_micro = BigIntegerField()
        created_at = CharField(max_length=24)
        started_at = CharField(max_length=24, null=True)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "workflows_step_runs"
            indexes = ((("run_id", "key"), True),)

    for columns, name in (
        ((StepRun.waits_for,), "workflows_step_runs_waits_for"),
        ((StepRun.event, StepRun.id), "workflows_step_runs_events"),
    ):
        StepRun.add_index(ModelIndex(StepRun, columns, where=columns[0].is_null(False), name=name))
    held = ModelIndex(
        StepRun, (StepRun.lease_until,), where=StepRun.lease.is_null(False), name="workflows_step_runs_leases"
    )
    StepRun.add_index(held)
    db.create_tables([Workflow, WorkflowVersion, Run, StepRun])
