"""Replays the event log from a cursor up to the point where live delivery begins, without gaps or duplicates.

A replay is queued before all live events that arrive after the replay was requested. The replay reads the log only as
fast as the viewer consumes the events, and ends where live delivery for its subscriptions began.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.events import log as event_log
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.plugin import Settings
from corral_core.event_log.api import last_seq_before
from corral_plugins.realtime.service.messages import EventFrame, NoticeFrame
from corral_plugins.realtime.service.viewer import Subscription, Viewer
from corral_plugins.realtime.settings import REPLAY_LIMIT

BATCH_SIZE = 200
WINDOW = 20_000  # the number of `seq` values scanned in one query for rare names
MAX_AGE_DAYS = 30

Names = tuple[str, ...] | None  # None means all names


class ReplayFactory:
    """Creates replays of the event log for viewers."""

    def __init__(self, work: Work, types: EventTypes, settings: Settings) -> None:
        self.work, self._types, self._settings = work, types, settings

    @property
    def max_events(self) -> int:
        """The maximum number of events in one replay."""
        return self._settings.get(REPLAY_LIMIT)

    def event_names_of(self, wanted: Sequence[Subscription]) -> Names:
        """Return the names of the events that match the given subscriptions, or None if all events match."""
        events = [each.event for each in wanted]
        return None if "*" in events else tuple(self._types.expand(events))

    def create_replay(
        self, viewer: Viewer, cursor: str, wanted: Sequence[Subscription], *, confirm: bool = False
    ) -> LogReplay:
        """Create a replay of the events after `cursor` for the given subscriptions.

        If `confirm` is set, the notice `resumed` is sent after the last event.
        """
        return LogReplay(self, viewer, cursor, tuple(wanted), confirm=confirm)


class LogReplay:
    """Replays events from the event log. Implements `corral_plugins.realtime.service.viewer.Replay`."""

    def __init__(
        self, replays: ReplayFactory, viewer: Viewer, cursor: str, wanted: tuple[Subscription, ...], *, confirm: bool
    ) -> None:
        self._replays, self._viewer, self._cursor, self._wanted, self._confirm = (
            replays,
            viewer,
            cursor,
            wanted,
            confirm,
        )
        self._served: list[tuple[Subscription, int]] = []
        self._names: Names = None
        self._place: int | None = None
        self._until = 0
        self._over = False

    async def next_part(self) -> Sequence[EventFrame | NoticeFrame] | None:
        """Return the next part of the replay, which may be empty, or None at the end of the replay."""
        if self._place is None:
            return await self._find_start()
        if self._over:
            return None
        if self._place >= self._until:
            self._over = True
            return [NoticeFrame("resumed", cursor=max(self._until, self._place))] if self._confirm else None
        records, self._place = await self._replays.work(self._next_records, read=True)
        return [item for item in map(EventFrame, records) if self._must_send(item)]

    async def _find_start(self) -> Sequence[NoticeFrame]:
        """Find the position at which the replay starts.

        Return a `gap` notice if events between the cursor and this position are skipped. Lower `since` of the replay's
        subscriptions to this position, so that later replays do not repeat the events of this replay. Increase
        `known` to this position: if the client was previously connected to a process that had read more of the log, it
        may already have received events that this process has yet to read.
        """
        self._served = [(each, each.since) for each in self._viewer.subscriptions.values()]
        self._until = max((each.since for each in self._wanted), default=0)
        self._names = self._replays.event_names_of(self._wanted)
        asked, place = await self._replays.work(self._cursor_and_start, read=True)
        place = await self._within_limit(place)
        self._place = place
        for each in self._wanted:
            each.since = min(each.since, place)
            each.known = max(each.known, place)
        self._viewer.ahead = max(self._viewer.ahead, place)
        if asked is not None and place <= asked:
            return []
        return [NoticeFrame("gap", **{"from": None if asked is None else asked + 1, "to": place})]

    def _must_send(self, item: EventFrame) -> bool:
        """Return whether the replay must send the event.

        The event must match one of the replay's subscriptions, and must not have been sent for another subscription.
        """
        if not any(each.live and each.matches(item) for each in self._wanted):
            return False
        seq = item.record.seq
        return not any(since < seq and each.matches(item) for each, since in self._served)

    # -- in a read unit

    def _cursor_and_start(self) -> tuple[int | None, int]:
        """Return the `seq` of the client's cursor, and the position at which the replay can start.

        The `seq` is None if the event at the cursor is no longer stored. Events older than 30 days are not replayed.
        """
        asked = event_log.seq_of(self._cursor)
        place = max(-1 if asked is None else min(asked, event_log.last_seq()), event_log.first_seq() - 1, 0)
        return asked, max(place, last_seq_before(clock.now(-MAX_AGE_DAYS * 86_400), place, self._until))

    async def _within_limit(self, place: int) -> int:
        """Return the first position at or after `place` that is followed by at most `max_events` matching events.

        The log is scanned in sections, which keeps each query short.
        """
        limit, high = self._replays.max_events, self._until
        if high - place <= limit:
            return place
        left = limit
        while high > place:
            low = max(place, high - WINDOW) if self._names is not None else place
            look = functools.partial(self._newest_records, low, high, left + 1)
            found = await self._replays.work(look, read=True)
            if len(found) > left:
                return int(found[left])
            left -= len(found)
            high = low
            await asyncio.sleep(0)
        return place

    def _newest_records(self, after: int, until: int, count: int) -> list[int]:
        query: Any = EventRow.select(EventRow.seq).where((EventRow.seq > after) & (EventRow.seq <= until))
        if self._names is not None:
            query = query.where(EventRow.type.in_(self._names))
        return [seq for (seq,) in query.order_by(EventRow.seq.desc()).limit(count).tuples()]

    def _next_records(self) -> tuple[list[LoggedEvent], int]:
        """Return the next records of the event log, and the position after them."""
        assert self._place is not None
        end = self._until if self._names is None else min(self._until, self._place + WINDOW)
        where = [EventRow.seq > self._place, EventRow.seq <= end]
        if self._names is not None:
            where.append(EventRow.type.in_(self._names))
        records = event_log.select(where, BATCH_SIZE)
        return records, records[-1].seq if len(records) == BATCH_SIZE else end
