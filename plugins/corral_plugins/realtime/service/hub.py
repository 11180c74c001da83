"""All viewers of this process: who asked for which event, and whether each may still see it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.core.api import Tickets
from corral.database.engine import Work
from corral.errors import Forbidden, Problem, TooMany, Unauthorized
from corral.events.feed import Feed
from corral.events.log import Record
from corral.events.registry import EventTypes
from corral.plugin import Settings
from corral_plugins.realtime.service.frames import Frames, frame
from corral_plugins.realtime.service.replay import Replay
from corral_plugins.realtime.service.viewer import RESTART, UNAUTHENTICATED, Subscription, Viewer
from corral_plugins.realtime.settings import MAX_SOCKETS, QUEUE_SIZE, REPLAY_LIMIT

log = logging.getLogger("corral.realtime")

MAX_IN_PROCESS = 2000
LOOK_EVERY = 0.75
WARN_SECONDS = 60.0


class Hub:
    """Lives on the event loop. The publisher never waits: a frame is queued for each viewer, or the viewer goes."""

    def __init__(
        self, feed: Feed, work: Work, credentials: Credentials, tickets: Tickets, settings: Settings, types: EventTypes
    ) -> None:
        self._feed, self._work, self._credentials = feed, work, credentials
        self._tickets, self._settings, self.types = tickets, settings, types
        self._viewers: set[Viewer] = set()
        self._by_event: dict[str, set[Viewer]] = {}
        self._frames = Frames()
        self._stop: Callable[[], None] = lambda: None
        self.dropped = 0

    def start(self) -> None:
        """Follow the log."""
        self._stop = self._feed.watch(self._publish)

    async def stop(self) -> None:
        """The server restarts: tell everybody, and give them a moment to hear it."""
        self._stop()
        self._stop = lambda: None
        for viewer in tuple(self._viewers):
            viewer.end(RESTART, frame("reload"))
        for _ in range(20):
            if not self._viewers:
                break
            await asyncio.sleep(0.05)

    @property
    def full(self) -> bool:
        """Whether this process takes no more connections."""
        return len(self._viewers) >= MAX_IN_PROCESS

    @property
    def count(self) -> int:
        """Open connections."""
        return len(self._viewers)

    # -- signing in

    async def authenticate(self, credential: str) -> tuple[Principal, Callable[[], Principal]]:
        """The caller of a token and how to read it again; `Unauthorized`, `Forbidden`."""
        caller = await self._work(lambda: self._credentials.authenticate(credential), read=True)
        return self._admit(caller), lambda: self._credentials.authenticate(credential)

    async def redeem(self, ticket: str) -> tuple[Principal, Callable[[], Principal]]:
        """The same for a ticket."""
        caller = await self._work(lambda: self._tickets.redeem(ticket))
        return self._admit(caller), lambda: self._tickets.reread(caller)

    @staticmethod
    def _admit(caller: Principal) -> Principal:
        if caller.kind == "worker" or not caller.may("realtime.read"):
            raise Forbidden("This credential may not follow events.")
        if caller.expires_at is not None and caller.expires_at <= clock.time_s():
            raise Unauthorized(code="token_expired")
        return caller

    def join(self, caller: Principal, reread: Callable[[], Principal]) -> Viewer:
        """A new connection; `TooMany` when its person has too many."""
        owner = caller.user_id or caller.id
        if sum(
            1 for viewer in self._viewers if (viewer.caller.user_id or viewer.caller.id) == owner
        ) >= self._settings.get(MAX_SOCKETS):
            raise TooMany("Too many open connections of this user.", code="concurrency_limit")
        viewer = Viewer(caller, reread, self._settings.get(QUEUE_SIZE))
        self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """The connection has ended."""
        self._viewers.discard(viewer)
        for viewers in self._by_event.values():
            viewers.discard(viewer)

    # -- subscriptions

    def subscribe(self, viewer: Viewer, subscription: Subscription) -> None:
        """From now on the viewer gets these events."""
        viewer.subscriptions[(subscription.pattern, subscription.filter)] = subscription
        for name in subscription.names:
            self._by_event.setdefault(name, set()).add(viewer)

    def unsubscribe(self, viewer: Viewer, pattern: str) -> None:
        """No more events of this pattern, whatever the filter."""
        for key in [key for key in viewer.subscriptions if key[0] == pattern]:
            del viewer.subscriptions[key]
        wanted = {name for each in viewer.subscriptions.values() for name in each.names}
        for name, viewers in self._by_event.items():
            if name not in wanted:
                viewers.discard(viewer)

    async def replay(self, viewer: Viewer, after: int, among: Sequence[Subscription]) -> int:
        """Send what came after `after`, then go on live without gap or double; returns the place reached."""
        replay = Replay(self._work, self._settings.get(REPLAY_LIMIT), self._frames.of)
        return await replay.run(viewer, after, self._feed.position, among)

    @property
    def position(self) -> int:
        """The `seq` up to which this process has handed events on."""
        return self._feed.position

    def _publish(self, records: Sequence[Record]) -> None:
        for record in records:
            for viewer in tuple(self._by_event.get(record.type, ())):
                if not viewer.offer(record, self._frames.of):
                    self.dropped += 1

    # -- rights

    async def watch_rights(self) -> None:
        """Read every caller again, for ever: who lost the session goes, who lost a right sees no more; supervised."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            viewers = [viewer for viewer in self._viewers if viewer.close_code is None]
            for start in range(0, len(viewers), 200):
                part = viewers[start : start + 200]
                found = await self._work(lambda part=part: [_read_again(viewer) for viewer in part], read=True)  # type: ignore[misc]  # bound per round
                for viewer, caller in zip(part, found, strict=True):
                    self._renew(viewer, caller)

    def _renew(self, viewer: Viewer, caller: Principal | None) -> None:
        now = clock.time_s()
        if caller is None or not caller.may("realtime.read"):
            viewer.end(UNAUTHENTICATED)
            return
        viewer.caller = caller
        if caller.expires_at is None:
            return
        if caller.expires_at <= now:
            viewer.end(UNAUTHENTICATED)
        elif caller.expires_at - now <= WARN_SECONDS and not viewer.warned:
            viewer.warned = True
            viewer.put(0, "", frame("token_expiring", expires_at=clock.format_instant(caller.expires_at)))

    def figures(self) -> Counter[str]:
        """For metrics."""
        return Counter(clients=len(self._viewers), dropped=self.dropped)


def _read_again(viewer: Viewer) -> Principal | None:
    try:
        return viewer.reread()
    except Problem:
        return None
