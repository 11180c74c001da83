"""Creates the kernel's own tables: events, consumers, jobs, schedules, leases and idempotency keys."""

from __future__ import annotations

from peewee import BigAutoField, BigIntegerField, BooleanField, CharField, IntegerField, Model, TextField


def up(migrator, db):
    class Event(Model):
        ins = BigAutoField()
        seq = BigIntegerField(null=True, unique=True)
        id = CharField(max_length=36, unique=True)
        type = CharField(max_length=100)
        ts = CharField(max_length=24)
        actor_type = CharField(max_length=20)
        actor_id = CharField(max_length=80, null=True)
        object_type = CharField(max_length=60)
        object_id = CharField(max_length=80)
        owner_id = CharField(max_length=36, null=True)
        visibility = CharField(max_length=20)
        data = TextField()
        cause = TextField(default="[]")

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_events"
            indexes = ((("object_id", "ins"), False),)

    class Consumer(Model):
        name = CharField(max_length=100, primary_key=True)
        cursor = BigIntegerField(default=0)
        failures = IntegerField(default=0)
        updated_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_consumers"

    class Job(Model):
        id = CharField(max_length=36, primary_key=True)
        name = CharField(max_length=100)
        arguments = TextField(default="{}")
        state = CharField(max_length=10, default="queued")
        run_at = CharField(max_length=24)
        attempts = IntegerField(default=0)
        lease = CharField(max_length=36, null=True)
        error = TextField(null=True)
        created_at = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_jobs"
            indexes = ((("state", "run_at"), False),)

    class Schedule(Model):
        name = CharField(max_length=100, primary_key=True)
        next_at = CharField(max_length=24)
        last_at = CharField(max_length=24, null=True)
        error = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_schedules"

    class Lease(Model):
        name = CharField(max_length=120, primary_key=True)
        holder = CharField(max_length=80)
        until = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_leases"

    class Idempotency(Model):
        key = CharField(max_length=64, primary_key=True)
        body_hash = CharField(max_length=64)
        status = IntegerField(null=True)
        headers = TextField(null=True)
        body = TextField(null=True)
        sealed = BooleanField(default=False)
        state = CharField(max_length=12)
        until = CharField(max_length=24, index=True)
        created_at = CharField(max_length=24)
        task_id = CharField(max_length=36, null=True, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "kernel_idempotency"

    db.create_tables([Event, Consumer, Job, Schedule, Lease, Idempotency])
