"""Consumes the event log: records the slots of event triggers, and the events that absence triggers wait for."""

from __future__ import annotations

from typing import Any

import msgspec

from corral import clock
from corral.auth.visibility import EventRights
from corral.database.statement import Parameter, Statement
from corral.events.log import LoggedEvent
from corral.ids import new_id
from corral_plugins.triggers.models import IS_ENABLED, Expectation, Trigger
from corral_plugins.triggers.service.owners import OwnerLacksRights, TriggerOwners
from corral_plugins.triggers.service.slots import TriggerSlots

MAX_MATCHES = 500
MAX_EXPECTATIONS = 10_000


def _followers(p: Parameter) -> Any:
    names = [p("type"), p("area")]
    follows = Trigger.event_key.in_(names) | Trigger.event_after.in_(names)
    return Trigger.select(Trigger.id).where(IS_ENABLED & follows).limit(1).tuples()


_FOLLOWER = Statement(_followers)
"""Finds one trigger that follows an event. Compiled, because it runs for every event, and most have no follower."""


class TriggerEvents:
    """Handles events. Every method runs in the caller's unit of work."""

    def __init__(self, slots: TriggerSlots, owners: TriggerOwners, rights: EventRights) -> None:
        self._slots, self._owners, self._rights = slots, owners, rights

    def handle(self, event: LoggedEvent) -> None:
        """Record what an event means for each trigger that follows it and whose owner may read it."""
        names = [event.type, f"{event.type.partition('.')[0]}.*"]
        if _FOLLOWER.one({"type": names[0], "area": names[1]}) is None:
            return
        follows = Trigger.event_key.in_(names) | Trigger.event_after.in_(names)
        is_new = Trigger.since <= event.ts  # later than the trigger was enabled
        for trigger in Trigger.select().where(IS_ENABLED & follows & is_new).limit(MAX_MATCHES):
            if not self.is_readable(trigger, event):
                continue
            if trigger.type == "event":
                self._slots.record(
                    trigger,
                    f"event:{event.id}",
                    scheduled_for=event.ts,
                    cause=event_causes(event),
                    payload=event.payload(),
                    event=event_facts(event),
                )
            else:
                _follow_absence(trigger, event, names)

    def is_readable(self, trigger: Trigger, event: LoggedEvent) -> bool:
        """Return whether the owner of a trigger may read an event. What a deactivated owner follows fires and fails."""
        try:
            owner = self._owners.principal(trigger.created_by)
        except OwnerLacksRights:
            return event.visibility == "shared"
        return self._rights.can_read(owner, event)


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
