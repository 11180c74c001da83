"""Shows the schedules of plugins to admins, and runs them on request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, NotFound
from corral.jobs.job import WEEKDAYS, Schedule, ScheduleRow, TimeOfDay
from corral.jobs.runner import JobRunner
from corral.plugin import Audit, AuditEntry
from corral.plugins.registry import PluginRegistry
from corral.schema.fields import Instant

WAIT_SECONDS = 20.0  # a longer run continues after the response


class ScheduleView(msgspec.Struct, kw_only=True):
    """A schedule of a plugin.

    `timing` describes when the schedule runs, for example `every 60 s` or `at 07:30 Europe/Berlin on mon, fri`.
    `next_at` is null until a process that runs schedules has started. `error` is the error of the last run.
    """

    name: str
    timing: str
    running: bool
    last_at: Instant | None
    next_at: Instant | None
    error: str | None


class ScheduleAdministration:
    """Runs schedules on request, exactly as the timer runs them."""

    audit: Audit | None = None

    def __init__(self, registry: PluginRegistry, runner: JobRunner, work: Work) -> None:
        self._registry, self._runner, self._work = registry, runner, work

    async def run(self, plugin: str, name: str, *, entry: UnitContext) -> ScheduleView:
        """Run a schedule now, wait at most `WAIT_SECONDS` for it, and return its view. `entry` identifies the admin.

        Raise `NotFound` for an unknown plugin or schedule, and `Conflict` if the plugin is not active or the schedule
        is already running.
        """
        row = await self._work(lambda: self._claim(plugin, name), entry=entry)
        await asyncio.wait({self._runner.start_schedule(row)}, timeout=WAIT_SECONDS)
        schedule = self._runner.schedules[name]
        return (await self._work(lambda: schedule_views([schedule], stored_schedules()), read=True))[0]

    def _claim(self, plugin: str, name: str) -> ScheduleRow:
        record = self._registry.get(plugin)
        if record is None:
            raise NotFound(f"There is no plugin named {plugin}; `corral plugins list` shows all plugins.")
        if not record.active:
            detail = f"The plugin {plugin} is {record.state}, so its schedules do not run."
            raise Conflict(detail, current_status=record.state)
        names = [schedule.name for schedule in record.contributions_to("corral_schedules")]
        if name not in names:
            known = f"its schedules are {', '.join(names)}" if names else "it has no schedules"
            raise NotFound(f"The plugin {plugin} has no schedule {name}; {known}.")
        ((row, is_claimed),) = self._runner.claim_schedules([name], due=True)
        if not is_claimed:
            raise Conflict(f"The schedule {name} is already running.", current_status="running")
        if self.audit is not None:
            action, details = "plugins.schedule.run", {"plugin": plugin}
            self.audit.record(AuditEntry(action=action, object_type="schedule", object_id=name, details=details))
        return row


def stored_schedules() -> dict[str, ScheduleRow]:
    """Return the stored states of all schedules, keyed by name. Runs in the caller's unit of work."""
    return {row.name: row for row in ScheduleRow.select()}


def schedule_views(schedules: Iterable[Schedule], rows: Mapping[str, ScheduleRow]) -> list[ScheduleView]:
    """Return the views of schedules. `rows` contains their stored states, keyed by name."""
    return [_view(schedule, rows.get(schedule.name)) for schedule in schedules]


def _view(schedule: Schedule, row: ScheduleRow | None) -> ScheduleView:
    if row is None:
        row = ScheduleRow(name=schedule.name)
    next_at = row.next_at
    if row.lease is not None:  # while it runs, the row has the end of its lease
        next_at = clock.format_instant(schedule.next_after(clock.parse_instant(row.last_at)))
    return ScheduleView(
        name=schedule.name,
        timing=timing_in_words(schedule),
        running=row.lease is not None,
        last_at=row.last_at,
        next_at=next_at,
        error=row.error,
    )


def timing_in_words(schedule: Schedule) -> str:
    """Describe when a schedule runs, for example `every 60 s` or `at 07:30 Europe/Berlin on mon, fri`."""
    if not isinstance(schedule.every, TimeOfDay):
        return f"every {schedule.every:g} s"
    days = "" if {*schedule.every.days} == {*WEEKDAYS} else f" on {', '.join(schedule.every.days)}"
    return f"at {schedule.every.time} {schedule.every.zone}{days}"
