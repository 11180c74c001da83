"""The live end of the log in this process: reads new events once, hands them to viewers, wakes long polls."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

from corral.database.engine import Database
from corral.database.unit import Entry
from corral.events import log as event_log
from corral.events.bus import Bus
from corral.events.log import Record

log = logging.getLogger("corral.events")

LOOK_EVERY, PAUSE = 0.5, 0.010
SEQUENCE_EVERY, IDLE_SEQUENCE_EVERY = 0.010, 0.25
AT_ONCE = 500
FOLLOWING, NUMBERING = Entry("events.feed"), Entry("events.sequencer")

Viewer = Callable[[Sequence[Record]], None]


class Feed:
    """`watch` gets every new event in order, on the loop; `waiting` wakes on topics (event names, ids of objects and
    actors).
    """

    def __init__(self, database: Database, bus: Bus) -> None:
        self._database, self.bus = database, bus
        self._bell = asyncio.Event()
        self._unnumbered = asyncio.Event()
        self._viewers: list[Viewer] = []
        self._topics: dict[str, set[asyncio.Event]] = {}
        self.position = 0

    def committed(self, emitted: bool) -> None:
        """Units were committed here; `emitted`: with events."""
        if emitted:
            if self._database.kind == "postgresql":
                self._unnumbered.set()
            else:
                self.bus.ring()

    def watch(self, viewer: Viewer) -> Callable[[], None]:
        """Call `viewer` with each batch of new events; it must neither block nor fail. Returns how to stop."""
        self._viewers.append(viewer)
        return lambda: self._viewers.remove(viewer)

    @contextlib.contextmanager
    def waiting(self, topics: Sequence[str]) -> Iterator[asyncio.Event]:
        """An `asyncio.Event` that is set when one of the topics rings."""
        event = asyncio.Event()
        for topic in topics:
            self._topics.setdefault(topic, set()).add(event)
        try:
            yield event
        finally:
            for topic in topics:
                waiters = self._topics[topic]
                waiters.discard(event)
                if not waiters:
                    del self._topics[topic]

    async def start(self) -> None:
        """Begin at the present end of the log."""
        self.position = await self._database.work(event_log.last_seq, read=True)
        await self.bus.start(self._bell.set)

    async def follow(self) -> None:
        """Read and hand on, for ever; supervised by the kernel."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._bell.wait()
            self._bell.clear()
            await self.look()
            await asyncio.sleep(PAUSE)  # the first ring is answered at once; what follows closely is read together

    async def look(self) -> None:
        """Hand on what is new in the log."""
        more = True
        while more:
            after = functools.partial(event_log.read, self.position, AT_ONCE)
            records = await self._database.read(after, FOLLOWING)
            more = len(records) == AT_ONCE
            if records:
                self.position = records[-1].seq
                self._hand_on(records)

    def _hand_on(self, records: Sequence[Record]) -> None:
        for viewer in tuple(self._viewers):
            try:
                viewer(records)
            except Exception:
                log.exception("a viewer of the event feed failed")
        if self._topics:
            for record in records:
                for topic in (record.type, record.object_id, record.actor_id or ""):
                    for event in self._topics.get(topic, ()):
                        event.set()

    async def sequence(self) -> None:
        """PostgreSQL: number committed events every 10 ms or on the bell, for ever; supervised by the kernel."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SEQUENCE_EVERY):
                    await self._unnumbered.wait()
            self._unnumbered.clear()
            numbered = await self._database.work(event_log.number_committed, entry=NUMBERING)
            if numbered:
                self.bus.ring()
            if numbered == event_log.NUMBER_AT_ONCE:
                self._unnumbered.set()
            await asyncio.sleep(SEQUENCE_EVERY)
