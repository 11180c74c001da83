"""Tables of figures that are kept as things happen, so that no read has to count."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, Model


class Counter(Model):
    """How many tasks have this status and priority: the sum over all shards. A single shard may be negative."""

    status = peewee.CharField(max_length=12)
    priority = peewee.SmallIntegerField()
    shard = peewee.SmallIntegerField()
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "tasks_counters"
        primary_key = peewee.CompositeKey("status", "priority", "shard")


class OpenCounter(Model):
    """How many unfinished tasks a person has: the sum over all shards."""

    created_by = IdField()
    shard = peewee.SmallIntegerField()
    n = peewee.BigIntegerField()

    class Meta:
        table_name = "tasks_open"
        primary_key = peewee.CompositeKey("created_by", "shard")


class Hour(Model):
    """What ended in one hour, summed as it happens: the sum over all shards."""

    hour = peewee.CharField(max_length=13)
    shard = peewee.SmallIntegerField()
    completed = peewee.BigIntegerField(default=0)
    failed = peewee.BigIntegerField(default=0)
    duration_ms = peewee.BigIntegerField(default=0)
    queued = peewee.BigIntegerField(default=0)
    queue_ms = peewee.BigIntegerField(default=0)

    class Meta:
        table_name = "tasks_hours"
        primary_key = peewee.CompositeKey("hour", "shard")


class Mark(Model):
    """A place in the list of all tasks: its key, and how many tasks are between it and the mark before."""

    created_at = InstantField()
    task_id = IdField()
    n = peewee.IntegerField()

    class Meta:
        table_name = "tasks_marks"
        primary_key = peewee.CompositeKey("created_at", "task_id")


class Document(Model):
    """A task whose words the search knows. The numbers grow in the order of the list; `tasks_search` has the words."""

    n = peewee.BigAutoField()
    created_at = InstantField()
    task_id = IdField()

    class Meta:
        table_name = "tasks_documents"
        indexes = ((("created_at", "task_id"), True),)


TABLES: tuple[type[Model], ...] = (Counter, OpenCounter, Hour, Mark, Document)
