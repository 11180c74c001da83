"""Declarations of jobs and schedules, and the database rows that store their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import peewee

from corral import clock
from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.unit import Unit, current
from corral.ids import new_id

ItemName = Annotated[str, msgspec.Meta(max_length=100)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


class Job(msgspec.Struct, frozen=True):
    """A background job named `<plugin>.<verb>`.

    `run` receives the keyword arguments that were passed to `enqueue` (usually ids), and a service for each parameter
    that is annotated with the service's type. A `def` runs as one unit of work; an `async def` opens its own units with
    `Work`. Either may run more than once. Another process may claim the job after `lease_seconds`.
    """

    name: ItemName
    run: Callable[..., Any]
    max_attempts: PositiveInt = 5
    lease_seconds: PositiveInt = 300


class Schedule(msgspec.Struct, frozen=True):
    """A periodic task: one of the processes calls `run` every `every_seconds` seconds.

    Like the function of a job, `run` receives a service for each parameter that is annotated with the service's type.
    """

    name: ItemName
    every_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=366 * 86_400)]
    run: Callable[..., Any]


class JobRow(Model):
    """A job. `state` is queued, running, done or failed. A process claims a job by updating its row."""

    id = IdField(primary_key=True)
    name = peewee.CharField(max_length=100)
    arguments = JSONField(default=dict)
    state = peewee.CharField(max_length=10, default="queued")
    run_at = InstantField()
    attempts = peewee.IntegerField(default=0)
    lease = IdField(null=True)
    error = peewee.TextField(null=True)
    created_at = InstantField()
    finished_at = InstantField(null=True)

    class Meta:
        table_name = "kernel_jobs"
        indexes = ((("state", "run_at"), False),)


class ScheduleRow(Model):
    """The state of a schedule.

    `next_at` is the next due time. While the schedule runs, `next_at` is the end of its lease.
    """

    name = peewee.CharField(primary_key=True, max_length=100)
    next_at = InstantField()
    last_at = InstantField(null=True)
    error = peewee.TextField(null=True)

    class Meta:
        table_name = "kernel_schedules"


def enqueue(name: str, *, delay_seconds: float = 0.0, **arguments: Any) -> str:
    """Queue a job with JSON arguments when the current unit commits. Return the job's id.

    Raises `LookupError` if no active plugin declares the job.
    """
    unit, identifier = current(), new_id()
    if unit.database.jobs is not None and name not in unit.database.jobs:
        raise LookupError(f"no active plugin declares the job {name}; return it from corral_jobs")
    unit.jobs.append(
        {
            "id": identifier,
            "name": name,
            "arguments": arguments,
            "state": "queued",
            "run_at": clock.now(delay_seconds),
            "created_at": clock.now(),
        }
    )
    return identifier


def write_jobs(unit: Unit) -> None:
    """Insert the jobs of the unit. Called before the events of the unit are written."""
    JobRow.insert_many(unit.jobs).execute()
