"""The live feed of the event log: reads new events once per process, passes them to viewers, and wakes long polls.

The bus notifies other processes. A notification does not contain events; it only says that the log has new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from corral.database.engine import Database
from corral.database.unit import UnitContext
from corral.events import log as event_log
from corral.events.log import LoggedEvent

log = logging.getLogger("corral.events")

POLL_SECONDS, PAUSE_SECONDS = 0.5, 0.010
SEQUENCE_SECONDS, IDLE_SEQUENCE_SECONDS = 0.010, 0.25
BATCH = 500
FEED, SEQUENCER = UnitContext("events.feed"), UnitContext("events.sequencer")

Viewer = Callable[[Sequence[LoggedEvent]], None]


class Bus(Protocol):
    """Notifies all processes of new events.

    A lost notification does no harm, because every process also polls the log every 0.5 s.
    """

    def notify(self) -> None:
        """Announce new events. This method never blocks and never raises an exception."""
        ...

    async def start(self, wake: Callable[[], None]) -> None:
        """Start listening, and call `wake` on the event loop whenever any process sends a notification."""
        ...

    async def stop(self) -> None:
        """Stop listening for notifications."""
        ...


class MemoryBus:
    """A bus that notifies only its own process."""

    def __init__(self) -> None:
        self._wake: Callable[[], None] = lambda: None

    def notify(self) -> None:
        self._wake()

    async def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    async def stop(self) -> None:
        self._wake = lambda: None


class Feed:
    """Passes every new event to viewers in order, on the event loop, and wakes tasks that wait for one of its topics.

    The topics of an event are its name, the id of its object and the id of its actor.
    """

    def __init__(self, database: Database, bus: Bus) -> None:
        self.database, self.bus = database, bus
        self._wake_up = asyncio.Event()
        self._unnumbered = asyncio.Event()
        self._viewers: list[Viewer] = []
        self._topics: dict[str, set[asyncio.Event]] = {}
        self.position = 0

    def on_commit(self, emitted: bool) -> None:
        """Announce that this process has committed units of work. `emitted` is true if the units wrote events."""
        if emitted and self.database.kind == "postgresql":
            self._unnumbered.set()
        elif emitted:
            self.bus.notify()

    def watch(self, viewer: Viewer) -> Callable[[], None]:
        """Call `viewer` with each batch of new events. Return a function that ends the subscription.

        The viewer must not block or fail.
        """
        self._viewers.append(viewer)
        return lambda: self._viewers.remove(viewer)

    @contextlib.contextmanager
    def subscribe(self, topics: Sequence[str]) -> Iterator[asyncio.Event]:
        """Yield an `asyncio.Event` that is set whenever a new event has one of the topics."""
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
        """Set the position to the current end of the log, and start listening for notifications."""
        self.position = await self.database.work(event_log.last_seq, read=True)
        await self.bus.start(self._wake_up.set)

    async def run(self) -> None:
        """Pass on new events as they are logged, until cancelled. The kernel runs this method in a supervised task."""
        while True:
            await wait_and_clear(self._wake_up, POLL_SECONDS)
            await self.poll()
            await asyncio.sleep(PAUSE_SECONDS)  # collects events that follow closely into one batch

    async def poll(self) -> None:
        """Read new events and pass them to viewers and waiting tasks."""
        more = True
        while more:
            after = functools.partial(event_log.read, self.position, BATCH)
            records = await self.database.read(after, FEED)
            more = len(records) == BATCH
            if records:
                self.position = records[-1].seq
                self._publish(records)

    def _publish(self, records: Sequence[LoggedEvent]) -> None:
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

    async def run_sequencer(self) -> None:
        """Assign sequence numbers to committed events, at most once every 10 ms, until cancelled.

        The kernel runs this method in a supervised task, but only on PostgreSQL.
        """
        while True:
            await wait_and_clear(self._unnumbered, IDLE_SEQUENCE_SECONDS)
            numbered = await self.database.work(event_log.number_committed, entry=SEQUENCER)
            if numbered:
                self.bus.notify()
            if numbered == event_log.NUMBER_BATCH:
                self._unnumbered.set()
            await asyncio.sleep(SEQUENCE_SECONDS)


async def wait_and_clear(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, for at most `seconds`, and clear it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()
