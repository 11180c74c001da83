"""Records slots for triggers that fire at set times, and computes when each trigger is next due.

Each change applies only if the trigger's next slot has not changed since it was read, so any number of processes may
run the scheduler at the same time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import msgspec

from corral import clock
from corral.database.engine import Database
from corral.database.statement import Statement
from corral.database.unit import SYSTEM, UnitContext
from corral.plugin import Settings
from corral_core.accounts.api import TIMEZONE
from corral_plugins.admin.api import KillSwitch
from corral_plugins.triggers.api import TimeRule, TriggerKind
from corral_plugins.triggers.models import IS_ENABLED, PENDING, Expectation, Fire, Trigger
from corral_plugins.triggers.service.event_reader import first_unread
from corral_plugins.triggers.service.firing import TriggerFiring
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.slots import BATCH_SIZE, UNIT_SECONDS, TriggerSlots, enqueue_fires
from corral_plugins.triggers.service.timed_kinds import (
    MAX_COUNTED,
    ON_TIME_SECONDS,
    RUN_ALL,
    due_slots,
    fire_time,
)

log = logging.getLogger("corral.triggers")

LOST_SECONDS = 5.0  # after which a new slot is fired although its job did not
UNKNOWN_SECONDS = 60.0  # after which a trigger whose times could not be computed is looked at again
SWEPT = 50
ENTRY = UnitContext(label="job triggers.tick", actor=SYSTEM)

_MOVE_ON = Statement(
    lambda p: Trigger.update(
        {
            Trigger.since: p("since"),
            Trigger.next_slot_at: p("next_slot_at"),
            Trigger.next_fire_at: p("next_fire_at"),
        }
    ).where((Trigger.id == p("id")) & IS_ENABLED & (Trigger.next_slot_at == p("slot")))
)


class DueTrigger(NamedTuple):
    """A due trigger, with the slots to record, the number of missed slots, and the next slot."""

    row: Trigger
    slots: list[float]
    missed: int
    newest_missed: float
    next_slot: float | None


class TriggerTimes:
    """Computes the times at which triggers are due."""

    def __init__(self, types: TriggerTypeRegistry, settings: Settings) -> None:
        self._types, self._settings = types, settings

    @property
    def zone(self) -> str:
        """The time zone of the installation."""
        return self._settings.get(TIMEZONE)

    def rule(self, row: Trigger) -> TimeRule:
        """Return the data from which a trigger's kind computes when the trigger is due."""
        return TimeRule(config=row.config, since=clock.parse_instant(row.since), zone=self.zone)

    def kind(self, row: Trigger) -> TriggerKind | None:
        """Return the kind of a trigger, or None if no active plugin provides it."""
        return self._types.kind(row.type)

    def next_columns(self, row: Trigger, slot: float | None) -> dict[str, Any]:
        """Return the column values for the next slot of a trigger."""
        if slot is None:
            return {"next_slot_at": None, "next_fire_at": None}
        at = fire_time(row.id, row.config, slot)
        return {"next_slot_at": clock.format_instant(slot), "next_fire_at": clock.format_instant(at)}

    def columns_from_now(self, row: Trigger) -> dict[str, Any]:
        """Return the column values for the first slot after the current time. Missed slots do not fire.

        If no active plugin provides the kind of an enabled trigger, the trigger keeps its next slot until a plugin
        provides the kind again.
        """
        kind = self.kind(row)
        if kind is None and row.enabled:
            return {"next_slot_at": row.next_slot_at, "next_fire_at": row.next_fire_at}
        if kind is None or kind.next_time is None or not row.enabled:
            return self.next_columns(row, None)
        return self.next_columns(row, kind.next_time(self.rule(row), clock.time_s()))

    def timed_types(self) -> list[str]:
        """Return the types of triggers whose times can currently be computed."""
        return self._types.timed_types()

    def due(self, rows: Sequence[Trigger], now: float) -> list[DueTrigger]:
        """Determine which slots of due triggers fire.

        A trigger whose times cannot be computed is omitted, so that the other triggers still fire. Call this method in
        a thread, because it may take a long time after a long downtime.
        """
        found: list[DueTrigger] = []
        for row in rows:
            try:
                due = self._due(row, now)
            except Exception as error:
                log.warning("the times of a trigger are unknown", extra={"trigger": row.id}, exc_info=error)
            else:
                found += [] if due is None else [due]
        return found

    def _due(self, row: Trigger, now: float) -> DueTrigger | None:
        kind = self.kind(row)
        if kind is None or kind.next_time is None:  # its plugin has gone out of service since the row was read
            return None
        rule, first = self.rule(row), clock.parse_instant(row.next_slot_at)
        newest, count = due_slots(kind, rule, first, now)
        while len(newest) > 1 and fire_time(row.id, row.config, newest[-1]) > now:  # the jitter is not over yet
            newest, count = newest[:-1], count - 1
        last = newest[-1]
        is_late = now - fire_time(row.id, row.config, last) > ON_TIME_SECONDS
        in_window = [slot for slot in newest if now - slot <= row.catch_up_window_seconds]
        if not is_late and count == 1:
            slots = [last]
        elif row.catch_up == "skip":
            slots = [] if is_late else [last]
        else:
            slots = in_window[-RUN_ALL:] if row.catch_up == "run_all" else in_window[-1:]
        missed = count - len(slots)
        skipped = [slot for slot in newest if slot not in slots]
        newest_missed = skipped[-1] if skipped else first
        interval_rule = msgspec.structs.replace(rule, since=last)
        return DueTrigger(row, slots, missed, newest_missed, kind.next_time(interval_rule, last))


class TriggerScheduler:
    """Records slots for due triggers, and fires pending slots whose wait has ended."""

    kill_switch: KillSwitch | None

    def __init__(self, database: Database, times: TriggerTimes, slots: TriggerSlots, firing: TriggerFiring) -> None:
        self._database, self._work = database, database.work
        self._times, self._slots, self._firing = times, slots, firing

    async def record_due_slots(self) -> None:
        """Record slots for all due triggers, so that the triggers fire."""
        while await self._database.read(self._has_due_triggers, ENTRY):
            rows = await self._work(lambda: list(self._due_triggers()), entry=ENTRY, read=True)
            now = clock.time_s()
            rest: Sequence[DueTrigger] = await asyncio.to_thread(self._times.due, rows, now)
            if unknown := {row.id for row in rows} - {each.row.id for each in rest}:
                await self._work(functools.partial(_postpone, unknown), entry=ENTRY)
            while rest:
                rest = await self._work(functools.partial(self._record, rest), entry=ENTRY)
            if len(rows) < BATCH_SIZE:
                return

    async def fire_waiting_slots(self) -> None:
        """Fire pending slots whose wait has ended, and new slots whose job was lost."""
        if waiting := await self._database.read(_waiting_fires, ENTRY):
            await self._firing.fire(waiting)

    async def end_waits(self) -> None:
        """Record slots for absence triggers whose expected event did not arrive in time.

        A wait ends only after all earlier events have been read. Otherwise, after a period in which no process ran
        jobs, a wait could end although its event had already arrived.
        """
        while await self._database.read(_has_ended_waits, ENTRY):
            if await self._work(self._record_absences, entry=ENTRY) < BATCH_SIZE:
                return

    def _is_kill_switch_engaged(self) -> bool:
        return self.kill_switch is not None and self.kill_switch.state().engaged

    def _has_due_triggers(self) -> bool:
        return not self._is_kill_switch_engaged() and bool(self._due_triggers().limit(1).exists())

    def _due_triggers(self) -> Any:
        due = Trigger.next_fire_at.is_null(False) & (Trigger.next_fire_at <= clock.now())
        due &= Trigger.type.in_(self._times.timed_types())  # the others wait until their plugin is back
        return Trigger.select().where(due & IS_ENABLED).order_by(Trigger.next_fire_at).limit(BATCH_SIZE)

    def _record(self, due: Sequence[DueTrigger]) -> Sequence[DueTrigger]:
        """Record due slots until the time limit of the unit of work is reached. Return the remaining triggers."""
        until, fires = time.monotonic() + UNIT_SECONDS, list[Fire]()
        # Triggers are locked in the order of their ids here and where slots are fired, so that no deadlock arises.
        due = sorted(due, key=lambda each: each.row.id)
        for n, (row, slots, missed, newest_missed, next_slot) in enumerate(due):
            if n and time.monotonic() > until:
                enqueue_fires(fires)
                return due[n:]
            last = max(slots[-1] if slots else newest_missed, newest_missed)
            changes = {**self._times.next_columns(row, next_slot), "since": clock.format_instant(last)}
            if not _MOVE_ON.run({**changes, "id": row.id, "slot": row.next_slot_at}):
                continue
            if missed:
                self._record_missed(row, newest_missed, missed)
            for slot in slots:
                at = clock.format_instant(slot)
                fire = self._slots.record(row, at, scheduled_for=at, announce=False)
                fires += [] if fire is None else [fire]
        enqueue_fires(fires)
        return ()

    def _record_missed(self, row: Trigger, slot: float, missed: int) -> None:
        at = clock.format_instant(slot)
        number = f"at least {missed}" if missed >= MAX_COUNTED - RUN_ALL else str(missed)
        reason = f"{number} slots were missed while no scheduler ran or the kill switch was engaged."
        self._slots.record(row, at, scheduled_for=at, status="skipped_missed", reason=reason)

    def _record_absences(self) -> int:
        if self._is_kill_switch_engaged():
            return 0
        due = (
            Expectation.select()
            .where(Expectation.due_at <= min(clock.now(), first_unread() or clock.LAST))
            .order_by(Expectation.due_at)
            .limit(BATCH_SIZE)
        )
        rows = list(due)
        ids = [each.trigger_id for each in rows]
        triggers = {row.id: row for row in Trigger.select().where(Trigger.id.in_(ids) & IS_ENABLED)}
        fires: list[Fire] = []
        for row in rows:
            same = (Expectation.id == row.id) & (Expectation.due_at == row.due_at)
            if not Expectation.delete().where(same).execute() or (trigger := triggers.get(row.trigger_id)) is None:
                continue
            event = {"expected": trigger.config["expect"], "since": row.since, "key": row.key or None}
            slot, facts = f"absence:{row.id}", {"payload": row.payload, "event": event}
            fire = self._slots.record(trigger, slot, scheduled_for=row.due_at, announce=False, **facts)
            fires += [] if fire is None else [fire]
        enqueue_fires(fires)
        return len(rows)


def _postpone(trigger_ids: Collection[str]) -> None:
    """Make triggers due again later, because their times cannot be computed now. Their next slots do not change."""
    due = Trigger.id.in_(list(trigger_ids)) & (Trigger.next_fire_at <= clock.now())
    Trigger.update(next_fire_at=clock.now(UNKNOWN_SECONDS)).where(due).execute()


def _has_ended_waits() -> bool:
    return bool(Expectation.select().where(Expectation.due_at <= clock.now()).limit(1).exists())


def _waiting_fires() -> list[str]:
    now, lost = clock.now(), clock.now(-LOST_SECONDS)
    has_waited = (Fire.stage != "new") | (Fire.due_at > Fire.created_at)
    is_over = has_waited | (Fire.due_at <= lost)
    found: Any = Fire.select(Fire.id).where(PENDING & (Fire.due_at <= now) & is_over)
    return [str(row[0]) for row in found.order_by(Fire.due_at).limit(SWEPT).tuples()]
