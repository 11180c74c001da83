"""The registry of declared events: name, payload, visibility, and the plugin that emits them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import msgspec

from corral.events.event import Event


class EventType(msgspec.Struct, frozen=True):
    """A declared event type."""

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
        """Add all the events of a plugin, or none. Raises `ValueError` if a name is already declared."""
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
        """Return the names that match the patterns: a name, `task.*` or `*`. An exact name need not be declared."""
        names: set[str] = set()
        for pattern in patterns:
            if pattern == "*":
                names |= set(self._types)
            elif pattern.endswith(".*"):
                names |= {name for name in self._types if name.startswith(pattern[:-1])}
            else:
                names.add(pattern)
        return sorted(names)

    def knows(self, pattern: str) -> bool:
        """Return whether the name or pattern matches a declared event."""
        return bool(self._types.keys() & set(self.expand([pattern])))
