"""Reads the event log. Records slots for event triggers, and the events that absence triggers wait for.

A scheduled job reads the log once a second, and reads only events that at least one trigger listens for. An event
subscriber would instead run for every event in the installation, even if no trigger listens for the event.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import EventRights
from corral.database.engine import Database
from corral.database.unit import SYSTEM, UnitContext
from corral.events import log as event_log
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.ids import new_id
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_core.event_log.api import LogCursor, PositionMoved, handle_next
from corral_plugins.triggers.models import IS_ENABLED, Expectation, Fire, Trigger
from corral_plugins.triggers.service.slots import TriggerSlots, enqueue_fires

CURSOR = LogCursor("triggers.consume")
TRIGGERS_AT_ONCE = 200
READ_AT_ONCE = 100
FIRES_AT_ONCE = 200
"""The number of recorded slots after which a unit of work ends.

The limit keeps units of work short if many triggers listen for the same event.
"""
ENTRY = UnitContext(label="job triggers.consume", actor=SYSTEM)
MAX_EXPECTATIONS = 10_000
Owners = dict[str | None, Principal | None]
"""The owners of triggers, keyed by user id, with their current permissions.

The value is None if the account was deleted or deactivated.
"""


class LogReadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of reading the log. `has_more` is true if there may be more events.

    `seq` is the sequence number of an event that has not yet been recorded for all triggers that listen for it, or 0.
    `trigger_id` is the id of the last trigger for which this event has been recorded.
    """

    has_more: bool = True
    seq: int = 0
    trigger_id: str = ""

    def last_trigger_id(self, event: LoggedEvent) -> str:
        """Return the id of the last trigger for which the event has already been recorded, or an empty string."""
        return self.trigger_id if event.seq == self.seq else ""


class TriggerLogReader:
    """Reads the event log from the stored position onwards. Any number of processes may do so at the same time."""

    def __init__(self, database: Database, events: TriggerEvents, types: EventTypes) -> None:
        self._database, self._work, self._events, self._types = database, database.work, events, types

    async def create_position(self) -> None:
        """Store the end of the log as the position if no position is stored, so that no later event is missed."""
        if not await self._work(CURSOR.exists, entry=ENTRY, read=True):  # a start on a full disk only reads
            await self._work(CURSOR.create, entry=ENTRY)

    async def handle_new_events(self) -> None:
        """Handle all new events. If another process reads the same events first, leave the rest to that process."""
        progress = LogReadProgress()

        async def read(limit: int) -> bool:
            nonlocal progress
            progress = await self._work(functools.partial(self._read_batch, progress, limit), entry=ENTRY)
            return progress.has_more

        async def skip(reason: str) -> bool:
            return await self._work(functools.partial(self._count_failure, reason), entry=ENTRY)

        if not await self._database.read(CURSOR.is_behind, ENTRY):
            return
        with contextlib.suppress(PositionMoved):
            while await handle_next(read, skip, READ_AT_ONCE):
                pass

    def _read_batch(self, progress: LogReadProgress, limit: int = READ_AT_ONCE) -> LogReadProgress:
        """Handle the next events and advance the stored position."""
        position = CURSOR.position()
        newest = event_log.last_seq()  # read first, because later events must come after the position
        if newest == position:
            return LogReadProgress(has_more=False)
        events = self._next_events(position, newest, limit)
        fires: list[Fire] = []
        owners: Owners = {}
        handled, last = 0, ""
        while handled < len(events) and len(fires) < FIRES_AT_ONCE:
            event = events[handled]
            found, last = self._events.handle(event, owners, after=progress.last_trigger_id(event))
            fires += found
            if last:  # the next unit records the event for further triggers
                progress = LogReadProgress(seq=event.seq, trigger_id=last)
                break
            handled += 1
        enqueue_fires(fires)
        if not last:
            progress = LogReadProgress(has_more=handled < len(events) or len(events) == limit)
        reached = events[handled - 1].seq if handled else position
        CURSOR.move(position, reached if progress.has_more else newest)
        return progress

    def _next_events(self, position: int, newest: int, limit: int) -> list[LoggedEvent]:
        names = self._types.expand(followed_events())
        where = [EventRow.seq > position, EventRow.seq <= newest, EventRow.type.in_(names)]
        return event_log.select(where, limit) if names else []

    def _count_failure(self, reason: str) -> bool:
        """Count a failure to handle the next event.

        Return whether the event was skipped because it failed too often.
        """
        position = CURSOR.position()
        events = self._next_events(position, event_log.last_seq(), 1)
        return bool(events) and CURSOR.count_failure(position, events[0], reason)


class TriggerEvents:
    """Handles events for triggers. Every method runs in the caller's unit of work."""

    def __init__(self, slots: TriggerSlots, accounts: Accounts, rights: EventRights) -> None:
        self._slots, self._accounts, self._rights = slots, accounts, rights

    def handle(self, event: LoggedEvent, owners: Owners, *, after: str) -> tuple[list[Fire], str]:
        """Record an event for triggers that listen for it and whose owners may read it.

        One call handles a limited number of triggers, in the order of their ids. `after` is the id of the last trigger
        for which the event was already recorded. `owners` caches the owners that this unit of work has read. Recording
        an event twice for the same trigger has no effect.

        Return the new history rows, for which the caller must enqueue jobs. Also return the id of the trigger after
        which the next unit of work must continue, or an empty string if the event has been recorded for all triggers.
        """
        fires: list[Fire] = []
        names = [event.type, f"{event.type.partition('.')[0]}.*"]
        follows = Trigger.event_key.in_(names) | Trigger.event_after.in_(names)
        is_new = Trigger.since <= event.ts  # later than the trigger was enabled
        which = IS_ENABLED & follows & is_new & (Trigger.id > after)
        triggers = list(Trigger.select().where(which).order_by(Trigger.id).limit(TRIGGERS_AT_ONCE))
        for trigger in triggers:
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
        return fires, triggers[-1].id if len(triggers) == TRIGGERS_AT_ONCE else ""

    def _owner(self, user_id: str | None) -> Principal | None:
        try:
            return self._accounts.principal_of(user_id)
        except InsufficientRights:
            return None

    def is_readable(self, trigger: Trigger, event: LoggedEvent, owners: Owners) -> bool:
        """Return whether the owner of a trigger may read an event.

        If the owner's account is deactivated or deleted, only events with the visibility `shared` count as readable.
        The trigger then fires and fails, so that the history shows the failure.
        """
        if trigger.created_by not in owners:
            owners[trigger.created_by] = self._owner(trigger.created_by)
        owner = owners[trigger.created_by]
        return event.visibility == "shared" if owner is None else self._rights.can_read(owner, event)


def followed_events() -> set[str]:
    """Return the names and patterns of the events that enabled triggers listen for."""
    follows = Trigger.event_key.is_null(False)
    found: Any = Trigger.select(Trigger.event_key, Trigger.event_after).where(IS_ENABLED & follows).distinct()
    return {name for pair in found.tuples() for name in pair if name is not None}


def first_unread() -> str | None:
    """Return the time of the first unread event, or None if all events have been read."""
    found = event_log.select([EventRow.seq > CURSOR.position()], 1)
    return found[0].ts if found else None


def event_causes(event: LoggedEvent) -> tuple[str, ...]:
    """Return the ids of the triggers and tasks that led to an event."""
    found: list[str] = msgspec.json.decode(event.cause)
    return tuple(found)


def event_facts(event: LoggedEvent) -> dict[str, Any]:
    """Return the data about an event that is available to expressions as `event`."""
    return {
        "id": event.id,
        "type": event.type,
        "ts": event.ts,
        "object": {"type": event.object_type, "id": event.object_id},
        "actor": {"type": event.actor_type, "id": event.actor_id},
    }


def begin_absence_wait(trigger: Trigger, *, key: str, since: str, payload: Any) -> None:
    """Start a wait of an absence trigger for one value of the field that `for_each` names (`key`).

    Do nothing if the trigger is already waiting for this value, or if it has reached the maximum number of waits.
    """
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
            begin_absence_wait(trigger, key=key, since=event.ts, payload=payload)
    elif trigger.event_after in names:
        begin_absence_wait(trigger, key=key, since=event.ts, payload=payload)


def _key_of(payload: Any, path: str | None) -> str:
    """Return the value at a path such as `object.id` as a string, or an empty string if `path` is None."""
    if path is None:
        return ""
    for name in path.split("."):
        payload = payload.get(name) if isinstance(payload, dict) else None
    return (payload if isinstance(payload, str) else msgspec.json.encode(payload).decode())[:200]
