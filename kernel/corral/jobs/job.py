"""Declarations of jobs and schedules, and the database rows that store their state."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import msgspec
import peewee

from corral import clock
from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.unit import current
from corral.ids import new_id

ItemName = Annotated[str, msgspec.Meta(max_length=100)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
COMMON_SECONDS = range(1, 61)  # intervals that are due at common moments
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Job(msgspec.Struct, frozen=True):
    """A background job named `<plugin>.<verb>`.

    `run` receives the keyword arguments that were passed to `enqueue` (usually ids), and a service for each parameter
    that is annotated with the service's type. A `def` function runs as one unit of work; an `async def` function opens
    its own units with `Work`. Either may run more than once. Another process may claim the job after `lease_seconds`.

    If `run` raises an exception, it is called again after 2 s, 4 s, 8 s and so on, with a delay of at most 10 minutes,
    until `max_attempts` attempts have failed. The job is then marked as failed, and its row keeps the error. There is
    no callback for failed jobs. `run` cannot tell whether an attempt is the last one. A failure that is a
    `corral.errors.ExpectedFailure` is also retried, but does not count as a plugin error. If a process stops during an
    attempt, the attempt is repeated immediately and does not count; if the process was killed, the attempt counts.
    """

    name: ItemName
    run: Callable[..., Any]
    max_attempts: PositiveInt = 5
    lease_seconds: PositiveInt = 300


class TimeOfDay(msgspec.Struct, frozen=True):
    """A time of day such as `TimeOfDay("07:30", "Europe/Berlin")`, on every day or on some `days` of the week.

    `zone` is a name in the IANA time zone database. A time that is skipped when clocks are set forward is replaced by
    the next instant that exists. If a time occurs twice because clocks are set back, only the first occurrence counts.
    Raises `ValueError` if the time, the zone or a day is invalid.
    """

    time: str
    zone: str
    days: tuple[str, ...] = WEEKDAYS

    def __post_init__(self) -> None:
        if not re.fullmatch("([01][0-9]|2[0-3]):[0-5][0-9]", str(self.time)):
            raise ValueError(f"{self.time!r} is not a time of day; write it as HH:MM, such as 07:30")
        if not self.days or not {*self.days} <= {*WEEKDAYS}:
            raise ValueError(f"the days {self.days!r} must be one or more of {', '.join(WEEKDAYS)}")
        try:
            ZoneInfo(self.zone)
        except (LookupError, ValueError, OSError):
            remedy = "write it like Europe/Berlin, or install the package tzdata if this machine has no time zones"
            raise ValueError(f"{self.zone!r} is not an IANA time zone; {remedy}") from None

    def next_after(self, seconds: float) -> float:
        """Return the first instant after `seconds` at which this time of day occurs.

        Both instants are in epoch seconds.
        """
        from cronsim import CronSim

        hour, minute = self.time.split(":")
        local = datetime.fromtimestamp(seconds, ZoneInfo(self.zone))
        times = CronSim(f"{minute} {hour} * * {','.join(self.days)}", local)
        return next(at for each in times if (at := each.timestamp()) > seconds)


class Schedule(msgspec.Struct, frozen=True):
    """A periodic task: one of the processes calls `run` at a fixed interval, or at a time of day.

    The first run of a schedule with an interval starts immediately. If the interval is a whole number of seconds and at
    most a minute, the later runs are due at multiples of the interval. Many schedules are then due at the same time,
    and can be claimed together.

    Each run belongs to one due time. If the process is killed during a run, the run is repeated. If no process ran
    schedules for some time, there is only one run for all the due times that were missed. Like the function of a job,
    `run` receives a service for each parameter that is annotated with the service's type.
    """

    name: ItemName
    every: Annotated[float, msgspec.Meta(ge=0.1, le=366 * 86_400)] | TimeOfDay
    run: Callable[..., Any]

    def next_after(self, seconds: float) -> float:
        """Return the next due time after a run that started at `seconds`. Both times are in epoch seconds."""
        if isinstance(self.every, TimeOfDay):
            return self.every.next_after(seconds)
        is_common = self.every in COMMON_SECONDS
        return (seconds // self.every + 1) * self.every if is_common else seconds + self.every


class JobRow(Model):
    """A job in the database.

    `state` is `queued`, `running`, `done` or `failed`. A process claims a job by updating its row.
    """

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

    `next_at` is the next due time. While the schedule is running, it has a `lease`, and `next_at` is the end of this
    lease.
    """

    name = peewee.CharField(primary_key=True, max_length=100)
    next_at = InstantField()
    last_at = InstantField(null=True)
    lease = IdField(null=True)
    error = peewee.TextField(null=True)

    class Meta:
        table_name = "kernel_schedules"


def enqueue(name: str, *, delay_seconds: float = 0.0, **arguments: Any) -> str:
    """Queue a job with JSON arguments when the current unit of work commits. Return the job's id.

    The job runs as soon as a process has a free slot, but not before `delay_seconds` have passed.

    Raise `LookupError` if no active plugin declares the job.
    """
    unit, identifier = current(), new_id()
    if unit.database.jobs is not None and name not in unit.database.jobs:
        raise LookupError(f"no active plugin declares the job {name}; return it from corral_jobs")
    times = {"run_at": clock.now(delay_seconds), "created_at": clock.now()}
    unit.jobs.append((_write_jobs, {"id": identifier, "name": name, "arguments": arguments, **times}))
    return identifier


def _write_jobs(rows: list[Any]) -> None:
    JobRow.insert_many(rows).execute()
