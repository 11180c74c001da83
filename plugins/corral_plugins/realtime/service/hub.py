"""All viewers of this process, found by what they follow: one look a record, one append a viewer, no waiting."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import Problem, TooMany, Unavailable
from corral.events.feed import Feed
from corral.events.log import Record
from corral.events.registry import EventTypes
from corral.plugin import Settings
from corral_plugins.realtime.service.messages import RESTARTING, Item, Notice, Refusal
from corral_plugins.realtime.service.viewer import Key, Subscription, Viewer
from corral_plugins.realtime.settings import MAX_SOCKETS

MAX_CLIENTS = 2000
MAX_SUBSCRIPTIONS = 50
FAREWELL_SECONDS = 2.0
RIGHTS_EVENTS = frozenset(
    {"session.ended", "user.updated", "user.deactivated", "user.purged", "api_key.revoked", "api_key.rotated"}
)


class Hub:
    """Lives on the loop. `rights_changed` rings when an event says that somebody may have lost a right."""

    def __init__(self, feed: Feed, types: EventTypes, settings: Settings) -> None:
        self._feed, self._types, self._settings = feed, types, settings
        self.viewers: set[Viewer] = set()
        self._users: Counter[str] = Counter()
        self._index: dict[str, dict[Viewer, list[Subscription]]] = {}
        self._unwatch: Callable[[], None] = lambda: None
        self._pending = 0  # accepted, not yet signed in
        self.dropped = 0
        self.stopping = False
        self.occupied, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self.rights_changed = asyncio.Event()

    @property
    def position(self) -> int:
        """The `seq` up to which events were handed on."""
        return self._feed.position

    def start(self) -> None:
        """Follow the feed."""
        self.stopping = False
        self._unwatch = self._feed.watch(self.publish)

    async def drain(self) -> None:
        """The server restarts: tell everybody, and give them a moment to hear it."""
        self.stopping = True
        self.restart_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self._empty.wait()

    def stop(self) -> None:
        """Nothing follows any more; connections are let go."""
        self.stopping = True
        self._unwatch()
        self._unwatch = lambda: None
        for viewer in tuple(self.viewers):
            viewer.leave()

    def restart_all(self) -> None:
        """Send everybody `reload` and close with 1012."""
        for viewer in tuple(self.viewers):
            viewer.end(RESTARTING, "reconnect with your cursor", Notice("reload"), keep=True)

    # -- coming and going

    def refusal(self) -> Problem | None:
        """Why this process takes no further connection, if so."""
        if self.stopping:
            return Unavailable("The server is shutting down.", code="shutting_down")
        if len(self.viewers) + self._pending >= MAX_CLIENTS:
            return Unavailable("This process has as many live connections as it takes.", code="overloaded")
        return None

    def signing_in(self, change: int) -> None:
        """Count connections that have not signed in yet: +1, -1."""
        self._pending += change

    def check_user(self, user: str) -> None:
        """Raise `TooMany` when the user has as many connections as allowed."""
        allowed = self._settings.get(MAX_SOCKETS)
        if self._users[user] >= allowed:
            raise TooMany(f"One user may have {allowed} live connections; close one.", code="concurrency_limit")

    def join(self, viewer: Viewer) -> None:
        """A connection begins; raises what `check_user` raises. It counts until `leave`."""
        self.check_user(viewer.user)
        viewer.on_end = self._forget
        viewer.seen = self.position
        self._users[viewer.user] += 1
        self.viewers.add(viewer)
        self.occupied.set()
        self._empty.clear()

    def leave(self, viewer: Viewer) -> None:
        """The connection is over."""
        viewer.leave()
        if viewer in self.viewers:
            self.viewers.discard(viewer)
            self._users[viewer.user] -= 1
            self._users += Counter()  # forget who has none left
            if not self.viewers:
                self.occupied.clear()
                self._empty.set()

    # -- subscriptions

    def subscribe(self, viewer: Viewer, event: str, wanted: frozenset[tuple[str, str]] = frozenset()) -> Subscription:
        """From now on the viewer gets these events; asked twice it is the same subscription. Raises `Refusal`."""
        self.check(viewer.principal, event)
        key: Key = (event, wanted)
        known = viewer.subscriptions.get(key)
        if known is not None:
            return known
        if len(viewer.subscriptions) >= MAX_SUBSCRIPTIONS:
            raise Refusal("subscription_limit", f"One connection has at most {MAX_SUBSCRIPTIONS} subscriptions.")
        made = viewer.subscriptions[key] = Subscription(event, wanted, self.position)
        self._index.setdefault(event, {}).setdefault(viewer, []).append(made)
        return made

    def unsubscribe(self, viewer: Viewer, event: str) -> None:
        """No more events of this name or pattern, whatever the filter."""
        for key in [key for key in viewer.subscriptions if key[0] == event]:
            viewer.subscriptions.pop(key).live = False
        self._drop(viewer, event)

    def check(self, caller: Principal, event: str) -> None:
        """Raise `Refusal` when no event has this name or matches this pattern, or the caller may see none that does."""
        if not self._types.knows(event):
            raise Refusal("unknown_event", f"No event is named {event}; GET /api/v1/events/types lists them.")
        if not caller.is_admin and any(kind.event == event and kind.visibility == ADMIN for kind in self._types.all()):
            raise Refusal("forbidden", f"Only admins see {event}.")

    def _drop(self, viewer: Viewer, event: str) -> None:
        followers = self._index.get(event)
        if followers is not None:
            followers.pop(viewer, None)
            if not followers:
                del self._index[event]

    def _forget(self, viewer: Viewer) -> None:
        for event, _ in viewer.subscriptions:
            self._drop(viewer, event)

    # -- the feed

    def publish(self, records: Sequence[Record]) -> None:
        """Queue new events for who follows them. Called by the feed; never waits."""
        for record in records:
            name = record.type
            if name in RIGHTS_EVENTS:
                self.rights_changed.set()
            elif name == "plugin.state":
                self._follow_door(record)
            followed = [self._index[pattern] for pattern in patterns(name) if pattern in self._index]
            if followed:
                self._hand_on(Item(record), followed)

    def _hand_on(self, item: Item, followed: Sequence[dict[Viewer, list[Subscription]]]) -> None:
        seq = item.record.seq
        slow: list[Viewer] = []
        for followers in followed:
            for viewer, subscriptions in followers.items():
                if viewer.seen >= seq:  # another pattern has it already
                    continue
                if subscriptions[0].filter and not any(each.passes(item) for each in subscriptions):
                    continue
                viewer.seen = seq
                if not viewer.offer(item):
                    slow.append(viewer)
        for viewer in slow:
            self.dropped += 1 + viewer.lag()

    def _follow_door(self, record: Record) -> None:
        payload = record.payload()
        if payload.get("name") == "realtime" and payload.get("to") != "active":
            self.restart_all()


@functools.lru_cache(maxsize=4096)
def patterns(name: str) -> tuple[str, ...]:
    """What may be subscribed to get this event: `a.b.c`, `a.b.*`, `a.*`, `*`."""
    parts = name.split(".")
    return (name, *(".".join(parts[:size]) + ".*" for size in range(len(parts) - 1, 0, -1)), "*")
