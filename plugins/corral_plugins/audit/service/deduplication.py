"""Deduplicates repeated audit entries.

The first entry becomes a row. A second row contains the number of its repetitions within the next minute.
"""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from corral import clock
from corral.database.unit import Entry
from corral.plugin import AuditEntry

SECONDS = 60
MAX_KEYS = 10_000


class Repetitions(msgspec.Struct):
    """The number of repetitions of an audit entry since the entry was first written."""

    entry: AuditEntry
    by: Entry
    since: str
    until: float
    count: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the minute in which repetitions are counted has passed."""
        return self.until <= clock.time_s()

    def summary(self) -> AuditEntry:
        """Return the entry with the number of repetitions and their start time added to its details."""
        details = {**self.entry.details, "count": self.count, "since": self.since}
        return msgspec.structs.replace(self.entry, details=details)


class Deduplicator:
    """Counts repetitions in memory. A crash loses at most the counts of one minute, but never the first entry."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Repetitions] = {}

    def is_counted(self, entry: AuditEntry, by: Entry) -> bool:
        """Return whether the entry is a repetition, and count it if so.

        An entry is a repetition if the same entry was already written and its minute has not passed, or if the row with
        the count of that minute is still to be written.
        """
        repeated = self._by_key.get(_key(entry, by))
        if repeated is None or (repeated.is_over and not repeated.count):
            return False
        repeated.count += 1
        return True

    def started(self, entry: AuditEntry, by: Entry) -> None:
        """Start to count repetitions of an entry that was committed. Runs on the event loop."""
        key = _key(entry, by)
        repeated = self._by_key.get(key)
        if repeated is None and len(self._by_key) >= MAX_KEYS:  # beyond the limit, each entry is written as its own row
            return
        if repeated is None or (repeated.is_over and not repeated.count):
            until = clock.time_s() + SECONDS
            self._by_key[key] = Repetitions(entry=entry, by=by, since=clock.now(), until=until)

    def take_ended(self, *, all: bool = False) -> list[Repetitions]:
        """Remove and return the repetitions whose minute is over, or all of them. Runs on the event loop."""
        ended = [key for key, repeated in self._by_key.items() if all or repeated.is_over]
        return [repeated for repeated in [self._by_key.pop(key) for key in ended] if repeated.count]

    def put_back(self, repeated: Repetitions) -> None:
        """Put repetitions back that could not be written, so that they are retried. Runs on the event loop."""
        newer = self._by_key.setdefault(_key(repeated.entry, repeated.by), repeated)
        if newer is not repeated:
            newer.count, newer.since = newer.count + repeated.count, repeated.since


def _key(entry: AuditEntry, by: Entry) -> Hashable:
    who = (by.actor.type, by.actor.id or by.client_ip)  # anonymous callers are distinguished by address
    return (*who, entry.action, entry.object_type, entry.object_id, entry.code)
