"""Reads the event log: records the slots of event triggers, and the events that absence triggers wait for.

A schedule reads the log once a second, and only the events that a trigger follows. A durable consumer would be woken by
every event of the installation, whether or not any trigger follows events.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import EventRights
from corral.database.dialect import savepoint
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import ExpectedFailure
from corral.events import log as event_log
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.ids import new_id
from corral_core.accounts.api import Accounts, RightsLost
from corral_plugins.triggers.models import IS_ENABLED, Expectation, Fire, LogPosition, Trigger
from corral_plugins.triggers.service.slots import TriggerSlots, enqueue_fires

log = logging.getLogger("corral.triggers")

MAX_MATCHES = 500
READ_AT_ONCE = 100
FIRES_AT_ONCE = 200
"""The number of fires after which a unit of work ends, which keeps units short when many triggers follow an event."""
POSITION_ID = 1
ENTRY = UnitContext(label="job triggers.consume", actor=SYSTEM)
MAX_EXPECTATIONS = 10_000
Owners = dict[str | None, Principal | None]
"""The owners of triggers, each with the rights of the moment; None if the account is gone or deactivated."""


class TriggerLogReader:
    """Reads the event log from the stored position on. Any number of processes may do it at the same time."""

    def __init__(self, work: Work, events: TriggerEvents, types: EventTypes) -> None:
        self._work, self._events, self._types = work, events, types

    async def create_position(self) -> None:
        """Store the end of the log as the position if none is stored, so that no later event is missed."""
        if not await self._work(_has_position, entry=ENTRY, read=True):  # a start on a full disk only reads
            await self._work(_ensure_position, entry=ENTRY)

    async def read(self) -> None:
        """Handle all new events. Another process that reads at the same time does the rest."""
        with contextlib.suppress(PositionMoved):
            while await self._work(self._read_batch, entry=ENTRY):
                pass

    def _read_batch(self) -> bool:
        """Handle the next events and move the position. Return whether more events may follow."""
        position = LogPosition.get_by_id(POSITION_ID).seq
        newest = event_log.last_seq()  # read first, because later events must come after the position
        if newest == position:
            return False
        names = self._types.expand(followed_events())
        where = [EventRow.seq > position, EventRow.seq <= newest, EventRow.type.in_(names)]
        events = event_log.select(where, READ_AT_ONCE) if names else []
        fires: list[Fire] = []
        owners: Owners = {}
        handled = 0
        while handled < len(events) and len(fires) < FIRES_AT_ONCE:
            fires += self._handle(events[handled], owners)
            handled += 1
        enqueue_fires(fires)
        has_more = handled < len(events) or len(events) == READ_AT_ONCE
        unchanged = (LogPosition.id == POSITION_ID) & (LogPosition.seq == position)
        if not LogPosition.update(seq=events[handled - 1].seq if has_more else newest).where(unchanged).execute():
            raise PositionMoved
        return has_more

    def _handle(self, event: LoggedEvent, owners: Owners) -> list[Fire]:
        """Handle an event. One that cannot be handled is skipped, so that it does not stop all triggers."""
        try:
            with savepoint():
                return self._events.handle(event, owners)
        except peewee.DatabaseError:  # the unit of work runs again
            raise
        except Exception:
            log.exception("triggers could not handle an event", extra={"event_id": event.id, "type": event.type})
        return []


class PositionMoved(ExpectedFailure):
    """Another process has read the same events. What this unit of work wrote is rolled back."""


class TriggerEvents:
    """Handles events. Every method runs in the caller's unit of work."""

    def __init__(self, slots: TriggerSlots, accounts: Accounts, rights: EventRights) -> None:
        self._slots, self._accounts, self._rights = slots, accounts, rights

    def handle(self, event: LoggedEvent, owners: Owners) -> list[Fire]:
        """Record what an event means for each trigger that follows it and whose owner may read it.

        Return the new rows of the history. The caller enqueues the jobs that fire them. `owners` keeps the owners that
        were read before in the same unit of work.
        """
        fires: list[Fire] = []
        names = [event.type, f"{event.type.partition('.')[0]}.*"]
        follows = Trigger.event_key.in_(names) | Trigger.event_after.in_(names)
        is_new = Trigger.since <= event.ts  # later than the trigger was enabled
        for trigger in Trigger.select().where(IS_ENABLED & follows & is_new).order_by(Trigger.id).limit(MAX_MATCHES):
            if not self.is_readable(trigger, event, owners):
                continue
            if trigger.type == "event":
                fire = self._slots.record(
                    trigger,
                    f"event:{event.id}",
                    scheduled_for=event.ts,
                    cause=event_causes(event),
                    payload=event.payload(),
                    event=event_facts(event),
                    announce=False,
                )
                fires += [] if fire is None else [fire]
            else:
                _follow_absence(trigger, event, names)
        return fires

    def _owner(self, user_id: str | None) -> Principal | None:
        try:
            return self._accounts.principal_of(user_id)
        except RightsLost:
            return None

    def is_readable(self, trigger: Trigger, event: LoggedEvent, owners: Owners) -> bool:
        """Return whether the owner of a trigger may read an event. What a deactivated owner follows fires and fails."""
        if trigger.created_by not in owners:
            owners[trigger.created_by] = self._owner(trigger.created_by)
        owner = owners[trigger.created_by]
        return event.visibility == "shared" if owner is None else self._rights.can_read(owner, event)


def followed_events() -> set[str]:
    """Return the names and patterns of the events that enabled triggers follow."""
    follows = Trigger.event_key.is_null(False)
    found: Any = Trigger.select(Trigger.event_key, Trigger.event_after).where(IS_ENABLED & follows).distinct()
    return {name for pair in found.tuples() for name in pair if name is not None}


def first_unread() -> str | None:
    """Return the instant of the first event that has not been read yet, or None if all have been."""
    unread = EventRow.seq > LogPosition.get_by_id(POSITION_ID).seq
    found = event_log.select([unread], 1)
    return found[0].ts if found else None


def _has_position() -> bool:
    return bool(LogPosition.select().where(LogPosition.id == POSITION_ID).exists())


def _ensure_position() -> None:
    LogPosition.insert(id=POSITION_ID, seq=event_log.last_seq()).on_conflict_ignore().execute()


def event_causes(event: LoggedEvent) -> tuple[str, ...]:
    """Return the ids of the triggers and tasks that led to an event."""
    found: list[str] = msgspec.json.decode(event.cause)
    return tuple(found)


def event_facts(event: LoggedEvent) -> dict[str, Any]:
    """Return what expressions see of an event as `event`."""
    return {
        "id": event.id,
        "type": event.type,
        "ts": event.ts,
        "object": {"type": event.object_type, "id": event.object_id},
        "actor": {"type": event.actor_type, "id": event.actor_id},
    }


def expect(trigger: Trigger, *, key: str, since: str, payload: Any) -> None:
    """Begin the wait of an absence trigger for one key, unless it waits already."""
    if Expectation.select().where(Expectation.trigger_id == trigger.id).count() >= MAX_EXPECTATIONS:
        return
    due = clock.format_instant(clock.parse_instant(since) + trigger.config["within_seconds"])
    row = {"id": new_id(), "trigger_id": trigger.id, "key": key, "since": since, "due_at": due, "payload": payload}
    Expectation.insert(row).on_conflict_ignore().execute()


def _follow_absence(trigger: Trigger, event: LoggedEvent, names: list[str]) -> None:
    payload = event.payload()
    key = _key_of(payload, trigger.config.get("for_each"))
    if trigger.event_key in names:
        mine = (Expectation.trigger_id == trigger.id) & (Expectation.key == key)
        Expectation.delete().where(mine).execute()
        if trigger.event_after is None:
            expect(trigger, key=key, since=event.ts, payload=payload)
    elif trigger.event_after in names:
        expect(trigger, key=key, since=event.ts, payload=payload)


def _key_of(payload: Any, path: str | None) -> str:
    """Return the value at a path such as `object.id`, as text. Empty without a path."""
    if path is None:
        return ""
    for name in path.split("."):
        payload = payload.get(name) if isinstance(payload, dict) else None
    return (payload if isinstance(payload, str) else msgspec.json.encode(payload).decode())[:200]
