"""Decides whether events, such as those that triggers fire on, may contain untrusted text.

Such text reaches a trigger in the payload of an event: the error of a failed task, a title, or the subject of a
message. If the run that wrote the text is tainted, the work that the trigger starts is tainted too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from corral.events.log import LoggedEvent
from corral.ids import parse_id
from corral_plugins.triggers.api import TaintCheck
from corral_plugins.triggers.models import Fire
from corral_plugins.triggers.service.event_reader import event_causes, event_facts
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry


class EventTaintService:
    """Applies the taint checks for other plugins that pass on the content of events."""

    def __init__(self, types: TriggerTypeRegistry) -> None:
        self._types = types

    def is_tainted(self, event: LoggedEvent) -> bool:
        slot = Fire(id=event.id, event=event_facts(event), payload=event.payload(), cause=event_causes(event))
        mark_tainted([slot], self._types.taint_checks())
        return slot.is_tainted


def mark_tainted(rows: Sequence[Fire], checks: Sequence[TaintCheck]) -> None:
    """Set `is_tainted` on each slot whose event, payload or cause chain names a tainted object.

    Call this function only with slots that are about to fire, because each check reads the database once. Slots that a
    person fired manually are not marked, because that person vouches for the payload.
    """
    named = {row.id: set(_object_ids(row)) for row in rows if not row.is_manual and not row.is_tainted}
    ids = {each for names in named.values() for _, each in names}
    found = [(check, check.find(ids)) for check in checks] if ids else []
    for row in rows:
        if row.id in named:
            row.is_tainted = any(
                known.get(each, name in (check.type, check.field))
                for check, known in found
                for name, each in named[row.id]
            )


def taint_source(row: Fire) -> str:
    """Return the source of the taint of a slot: the event, or else the trigger."""
    return row.slot if row.slot.startswith("event:") else f"trigger:{row.trigger_id}"


def _object_ids(row: Fire) -> Iterator[tuple[str, str]]:
    """Yield the ids in the event, its payload and its causes.

    Each id comes with the name of the field that contains it, or, for the object of the event, with the object's type.
    """
    about = row.event.get("object") if row.event else None
    rest: list[tuple[str, Any]] = [("event", row.event), ("payload", row.payload), ("cause", row.cause)]
    rest += [(about["type"], about["id"])] if about else []
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(name, each) for each in value]
        elif isinstance(value, str) and (found := parse_id(value)):
            yield name, found
