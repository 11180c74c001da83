"""Events: typed payloads with a name and a visibility, emitted in a unit of work and written in its transaction.

`EventTypes` is the registry of the events that the active plugins declare.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import ClassVar

import msgspec

from corral.database.model import SHARED
from corral.database.unit import current
from corral.events.log import write_events
from corral.ids import new_id

DATA_LIMIT = 32 * 1024  # bytes of a payload


class Event(msgspec.Struct, kw_only=True):
    """Base class of all events.

    The fields of a subclass are the event's payload (at most 32 KiB). The first line of the subclass's docstring is the
    event's title.
    """

    event: ClassVar[str]
    """The public name of the event, in the form `noun.past_participle`."""
    visibility: ClassVar[str] = SHARED
    """Who may read the event: `shared`, `private`, `private_and_admin` or `admin` (see `corral.auth.visibility`)."""
    area: ClassVar[str] = ""
    """The permission area. The permission `<area>.read` lets callers read the objects that the event is about.

    If empty, the area is the name of the plugin that declares the event.
    """


def emit(
    event: Event,
    *,
    object: tuple[str, str],
    owner: str | None = None,
    visibility: str | None = None,
    cause: tuple[str, ...] | None = None,
) -> str:
    """Emit the event in the current unit of work and return its id. `object` is `(type, id)`, and `owner` is a user id.

    The event becomes visible to subscribers, `/ws` and the event log after the unit of work has committed. A private
    event needs an `owner`.

    `visibility` overrides the visibility of the class, for objects that may be private or shared.
    """
    unit, event_id, (object_type, object_id) = current(), new_id(), object
    actor, causes = unit.entry.actor, unit.entry.cause if cause is None else cause
    data = msgspec.json.encode(event)
    if len(data) > DATA_LIMIT:
        data = msgspec.json.encode({"id": object_id, "href": None, "truncated": True})
    row = {
        "id": event_id,
        "type": event.event,
        "actor_type": actor.type,
        "actor_id": actor.id,
        "object_type": object_type,
        "object_id": object_id,
        "owner_id": owner,
        "visibility": visibility or event.visibility,
        "data": data.decode(),
        "cause": msgspec.json.encode(causes).decode() if causes else "[]",
    }
    unit.collected.append((write_events, row))
    return event_id


class SystemAlert(Event, kw_only=True):
    """A condition that requires an admin's attention."""

    event = "system.alert"
    visibility = "admin"
    area = "settings"

    kind: str
    severity: str  # info | warning | critical
    title: str
    detail: str
    object: dict[str, str] | None = None
    check: str | msgspec.UnsetType = msgspec.UNSET  # kind "health" only: the name of the check, and its status
    status: str | msgspec.UnsetType = msgspec.UNSET


class EventType(msgspec.Struct, frozen=True):
    """An event type that a plugin has declared. `payload` is the event's class."""

    event: str
    title: str
    plugin: str
    visibility: str
    payload: type[Event]


class EventTypes:
    """The declared events of all active plugins."""

    def __init__(self) -> None:
        self._types: dict[str, EventType] = {}

    def declare(self, plugin: str, kinds: Iterable[type[Event]]) -> None:
        """Add all events of a plugin, or none of them. Raise `ValueError` if a name is already declared."""
        added: dict[str, EventType] = {}
        for kind in kinds:
            known = self._types.get(kind.event) or added.get(kind.event)
            if known is not None:
                raise ValueError(f"event {kind.event} is already declared by {known.plugin}")
            title = (inspect.getdoc(kind) or kind.event).partition("\n")[0]
            added[kind.event] = EventType(kind.event, title, plugin, kind.visibility, kind)
        self._types |= added

    def drop(self, plugin: str) -> None:
        """Remove the events of a plugin that failed."""
        self._types = {name: kind for name, kind in self._types.items() if kind.plugin != plugin}

    def all(self) -> list[EventType]:
        """Return all event types, sorted by name."""
        return [self._types[name] for name in sorted(self._types)]

    def expand(self, patterns: Iterable[str]) -> list[str]:
        """Return the names of the events that match the patterns.

        A pattern is a name, a prefix such as `task.*`, or `*`. A name is returned even if no such event is declared.
        """
        names: set[str] = set()
        for pattern in patterns:
            is_prefix = pattern == "*" or pattern.endswith(".*")
            names |= {name for name in self._types if name.startswith(pattern[:-1])} if is_prefix else {pattern}
        return sorted(names)

    def is_known(self, pattern: str) -> bool:
        """Return whether the name or pattern matches a declared event."""
        return bool(self._types.keys() & set(self.expand([pattern])))
