"""From a place in the log to the present, and over to live without a gap or a double."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from corral.database.engine import Work
from corral.events import log as event_log
from corral.events.log import EventRow, Record
from corral_plugins.realtime.service.frames import frame
from corral_plugins.realtime.service.viewer import Subscription, Viewer

AT_ONCE = 200


class Replay:
    """Live events are held while it runs; they come after the `until` that it reads to."""

    def __init__(self, work: Work, limit: int, encode: Callable[[Record], str]) -> None:
        self._work, self._limit, self._encode = work, limit, encode

    async def run(self, viewer: Viewer, after: int, until: int, among: Sequence[Subscription]) -> int:
        """Send the events with `after < seq <= until` that `among` asks for; returns `until`."""
        names = sorted({name for each in among for name in each.names})
        viewer.held = []
        try:
            start = await self._work(lambda: self._start(after, until, names), read=True)
            if start > after:
                viewer.put(0, "", frame("gap", **{"from": after + 1, "to": start}))
            while start < until and viewer.close_code is None:
                place = start
                records = await self._work(lambda place=place: self._read(place, until, names), read=True)  # type: ignore[misc]  # bound per round
                if not records:
                    break
                start = records[-1].seq
                for record in records:
                    if viewer.wants(record, among):
                        await self._put(viewer, record)
        finally:
            held, viewer.held = viewer.held or [], None
            for record in held:
                if record.seq > until:
                    viewer.offer(record, self._encode)
        return until

    async def _put(self, viewer: Viewer, record: Record) -> None:
        """A replay goes as fast as its reader."""
        while len(viewer.waiting) >= viewer.limit and viewer.close_code is None:
            viewer.room.clear()
            await viewer.room.wait()
        viewer.put(record.seq, record.type, self._encode(record))

    def _start(self, after: int, until: int, names: Sequence[str]) -> int:
        """Where the replay begins: after what was asked for, what is kept, and at most `limit` events back."""
        start = max(after, event_log.first_seq() - 1)
        beyond = (
            EventRow.select(EventRow.seq)
            .where((EventRow.seq > start) & (EventRow.seq <= until) & EventRow.type.in_(names))
            .order_by(EventRow.seq.desc())
            .offset(self._limit)
            .limit(1)
            .tuples()
            .first()
        )
        return int(beyond[0]) if beyond else start

    @staticmethod
    def _read(after: int, until: int, names: Sequence[str]) -> list[Record]:
        where = [EventRow.seq > after, EventRow.seq <= until, EventRow.type.in_(names)]
        return event_log.select(where, AT_ONCE)
