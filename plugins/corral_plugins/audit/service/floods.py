"""Repetitions of one denial: the first is written, the rest of a minute counted into one row."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from corral import clock
from corral.database.unit import Entry
from corral.plugin import AuditEntry

SECONDS = 60
LIMIT = 10_000


class Flood(msgspec.Struct):
    """What came again since the first was written."""

    entry: AuditEntry
    by: Entry
    since: str
    until: float
    count: int = 0

    @property
    def is_over(self) -> bool:
        """Its minute has passed."""
        return self.until <= clock.time_s()

    def summed(self) -> AuditEntry:
        """The row that tells how often it came."""
        details = {**self.entry.details, "count": self.count, "since": self.since}
        return msgspec.structs.replace(self.entry, details=details)


class Floods:
    """In the memory of one process. A process that dies loses the count of a minute, never a first row."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, Flood] = {}

    def counted(self, entry: AuditEntry, by: Entry) -> bool:
        """Whether this was counted, because its like was written within the minute; or before, and the sum of that
        minute is still to be written.
        """
        flood = self._seen.get(_key(entry, by))
        if flood is None or (flood.is_over and not flood.count):
            return False
        flood.count += 1
        return True

    def written(self, entry: AuditEntry, by: Entry) -> None:
        """The first was committed. On the loop."""
        key = _key(entry, by)
        flood = self._seen.get(key)
        if flood is None and len(self._seen) >= LIMIT:  # every one is a row of its own
            return
        if flood is None or (flood.is_over and not flood.count):
            until = clock.time_s() + SECONDS
            self._seen[key] = Flood(entry=entry, by=by, since=clock.now(), until=until)

    def over(self, *, all: bool = False) -> list[Flood]:
        """Take out what a minute (or `all`) has counted. On the loop."""
        ended = [key for key, flood in self._seen.items() if all or flood.is_over]
        return [flood for flood in [self._seen.pop(key) for key in ended] if flood.count]

    def again(self, flood: Flood) -> None:
        """It could not be written: go on counting, and look again next time. On the loop."""
        newer = self._seen.setdefault(_key(flood.entry, flood.by), flood)
        if newer is not flood:
            newer.count, newer.since = newer.count + flood.count, flood.since


def _key(entry: AuditEntry, by: Entry) -> Hashable:
    who = (by.actor.type, by.actor.id or by.client_ip)  # of those whom nobody knows, their address
    return (*who, entry.action, entry.object_type, entry.object_id, entry.code)
