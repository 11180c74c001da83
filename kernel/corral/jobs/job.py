"""Jobs and schedules as data, and the rows that hold them. The row decides; a runner only carries its id."""

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
Whole = Annotated[int, msgspec.Meta(ge=1)]


class Job(msgspec.Struct, frozen=True):
    """A named function `<plugin>.<verb>`. It takes the keyword arguments of `enqueue` (ids, never objects) and
    services by type.

    `def`: one unit of work. `async def`: opens its own with `Work`. It may run more than once. `seconds`: its lease;
    a job that runs longer is given to another process.
    """

    name: ItemName
    run: Callable[..., Any]
    max_attempts: Whole = 5
    seconds: Whole = 300


class Schedule(msgspec.Struct, frozen=True):
    """`run` once every `every_seconds`, in one process; services by type, `def` or `async def` like a job."""

    name: ItemName
    every_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=366 * 86_400)]
    run: Callable[..., Any]


class JobRow(Model):
    """A job to do. `state`: queued | running | done | failed."""

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
    """When a schedule is due next. While it runs, that is the end of its lease."""

    name = peewee.CharField(primary_key=True, max_length=100)
    next_at = InstantField()
    last_at = InstantField(null=True)
    error = peewee.TextField(null=True)

    class Meta:
        table_name = "kernel_schedules"


def enqueue(name: str, *, delay_seconds: float = 0.0, **arguments: Any) -> str:
    """Have the job done after the current unit commits; returns its id. `arguments` are JSON values."""
    unit = current()
    identifier = new_id()
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


def write(unit: Unit) -> None:
    """Write the unit's jobs; called before its events."""
    if unit.jobs:
        JobRow.insert_many(unit.jobs).execute()
