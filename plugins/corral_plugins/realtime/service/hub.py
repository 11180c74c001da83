"""Distributes events to the viewers of this process.

For each event, the hub looks up the subscribers in an index and appends the event to their queues. The hub never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import Problem, TooMany, Unavailable
from corral.events.event import EventTypes
from corral.events.live_feed import Feed
from corral.events.log import LoggedEvent
from corral.http.client_address import address_key
from corral.plugin import Settings
from corral_plugins.realtime.service.messages import RESTARTING, EventFrame, NoticeFrame, Refusal
from corral_plugins.realtime.service.viewer import Key, Subscription, Viewer
from corral_plugins.realtime.settings import MAX_SOCKETS

log = logging.getLogger("corral.realtime")

MAX_CLIENTS = 2000
MAX_PENDING, MAX_PENDING_OF_ADDRESS = 200, 20  # sockets whose first message must sign in
MAX_SUBSCRIPTIONS = 50
DRAIN_SECONDS = 2.0
RIGHTS_EVENTS = frozenset(
    {"session.ended", "user.updated", "user.deactivated", "user.purged", "api_key.revoked", "api_key.rotated"}
)


class ViewerHub:
    """The connected viewers of this process. Every method runs on the event loop.

    `rights_changed` is set when an event indicates that a user may have lost a permission.
    """

    def __init__(self, feed: Feed, types: EventTypes, settings: Settings) -> None:
        self._feed, self._types, self._settings = feed, types, settings
        self.viewers: set[Viewer] = set()
        self._users: Counter[str] = Counter()
        self._index: dict[str, dict[Viewer, list[Subscription]]] = {}
        self._unwatch: Callable[[], None] = lambda: None
        self._pending: Counter[str] = Counter()  # accepted connections that have not signed in yet, by address
        self.dropped = 0
        self.stopping = False
        self.occupied, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self.rights_changed = asyncio.Event()

    @property
    def position(self) -> int:
        """The `seq` of the last distributed event."""
        return self._feed.position

    def start(self) -> None:
        """Start following the event feed."""
        self.stopping = False
        self._unwatch = self._feed.watch(self.publish_events)

    async def disconnect_all(self) -> None:
        """Tell all viewers to reconnect because the server restarts, and wait briefly until they have disconnected."""
        self.stopping = True
        self.reconnect_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._empty.wait()

    def stop(self) -> None:
        """Stop following the event feed, and release all connections."""
        self.stopping = True
        self._unwatch()
        self._unwatch = lambda: None
        for viewer in tuple(self.viewers):
            viewer.stop_sending()

    def reconnect_all(self) -> None:
        """Send `reload` to all viewers, and close their connections with the code 1012."""
        for viewer in tuple(self.viewers):
            viewer.end_connection(RESTARTING, "reconnect with your cursor", NoticeFrame("reload"), keep=True)

    # -- connections

    def connection_refusal(self) -> Problem | None:
        """Return an error if this process accepts no more connections, otherwise None."""
        if self.stopping:
            return Unavailable("The server is shutting down.", code="shutting_down")
        if len(self.viewers) >= MAX_CLIENTS:
            return Unavailable(
                "This process has reached its limit of live connections; try again later.", code="overloaded"
            )
        return None

    @contextlib.contextmanager
    def pending_sign_in(self, client_ip: str) -> Iterator[None]:
        """Count a connection as pending until its sign-in has succeeded or failed.

        Raise `TooMany` if the client address has too many pending connections, or `Unavailable` if the process has too
        many.
        """
        key = address_key(client_ip)
        if self._pending[key] >= MAX_PENDING_OF_ADDRESS:
            raise TooMany("Too many connections from this address are waiting to sign in.", code="concurrency_limit")
        if self._pending.total() >= MAX_PENDING:
            raise Unavailable(
                "Too many connections are waiting to sign in; send the credential in the handshake.", code="overloaded"
            )
        self._pending[key] += 1
        try:
            yield
        finally:
            self._pending[key] -= 1
            self._pending += Counter()  # drop addresses without connections

    def check_connection_limit(self, user: str) -> None:
        """Raise `TooMany` if the user already has the maximum number of connections."""
        allowed = self._settings.get(MAX_SOCKETS)
        if self._users[user] >= allowed:
            raise TooMany(
                f"A user may have at most {allowed} live connections; close one of them first.",
                code="concurrency_limit",
            )

    def add_viewer(self, viewer: Viewer) -> None:
        """Register a connection, which counts towards the limit until `remove_viewer` is called.

        Raise `TooMany` if the user already has the maximum number of connections.
        """
        self.check_connection_limit(viewer.user_key)
        viewer.on_end = self._remove_viewer
        viewer.seen = self.position
        self._users[viewer.user_key] += 1
        self.viewers.add(viewer)
        self.occupied.set()
        self._empty.clear()

    def remove_viewer(self, viewer: Viewer) -> None:
        """Unregister a connection that has ended."""
        viewer.stop_sending()
        if viewer in self.viewers:
            self.viewers.discard(viewer)
            self._users[viewer.user_key] -= 1
            self._users += Counter()  # drop users without connections
            if not self.viewers:
                self.occupied.clear()
                self._empty.set()

    # -- subscriptions

    def subscribe(self, viewer: Viewer, event: str, wanted: frozenset[tuple[str, str]] = frozenset()) -> Subscription:
        """Subscribe the viewer to future events whose name matches `event`.

        `wanted` contains the fields that the data of the events must have, with their values.

        Repeated calls return the same subscription. Raise `Refusal` in the same cases as `check_subscription`, and also
        if the viewer has too many subscriptions.
        """
        self.check_subscription(viewer.principal, event)
        key: Key = (event, wanted)
        known = viewer.subscriptions.get(key)
        if known is not None:
            return known
        if len(viewer.subscriptions) >= MAX_SUBSCRIPTIONS:
            raise Refusal("subscription_limit", f"A connection can have at most {MAX_SUBSCRIPTIONS} subscriptions.")
        made = viewer.subscriptions[key] = Subscription(event, wanted, self.position)
        self._index.setdefault(event, {}).setdefault(viewer, []).append(made)
        return made

    def unsubscribe(self, viewer: Viewer, event: str) -> None:
        """End all subscriptions to this name or pattern, regardless of their filters."""
        for key in [key for key in viewer.subscriptions if key[0] == event]:
            viewer.subscriptions.pop(key).live = False
        self._remove_subscription(viewer, event)

    def check_subscription(self, caller: Principal, event: str) -> None:
        """Raise `Refusal` if no event matches this name or pattern, or if the caller may read none of the matching
        events.
        """
        if not self._types.is_known(event):
            raise Refusal("unknown_event", f"No event is named {event}; `corral api GET /events/types` lists them.")
        if not caller.is_admin and any(kind.event == event and kind.visibility == ADMIN for kind in self._types.all()):
            raise Refusal("forbidden", f"Only admins may subscribe to {event}.")

    def _remove_subscription(self, viewer: Viewer, event: str) -> None:
        followers = self._index.get(event)
        if followers is not None:
            followers.pop(viewer, None)
            if not followers:
                del self._index[event]

    def _remove_viewer(self, viewer: Viewer) -> None:
        if viewer.dropped:
            self.dropped += viewer.dropped
            facts = {"user": viewer.user_key, "dropped": viewer.dropped}
            log.warning("a live connection is closed because its client does not read", extra=facts)
        for event, _ in viewer.subscriptions:
            self._remove_subscription(viewer, event)

    # -- the feed

    def publish_events(self, records: Sequence[LoggedEvent]) -> None:
        """Add new events to the queues of their subscribers.

        The event feed calls this method, so it must never wait.
        """
        for record in records:
            name = record.type
            if name in RIGHTS_EVENTS:
                self.rights_changed.set()
            elif name == "plugin.state":
                self._on_plugin_state(record)
            followed = [self._index[pattern] for pattern in matching_patterns(name) if pattern in self._index]
            if followed:
                self._offer_to_subscribers(EventFrame(record), followed)

    def _offer_to_subscribers(self, item: EventFrame, followed: Sequence[dict[Viewer, list[Subscription]]]) -> None:
        seq = item.record.seq
        slow: list[Viewer] = []
        for followers in followed:
            for viewer, subscriptions in followers.items():
                if viewer.seen >= seq:  # already queued through another pattern
                    continue
                if subscriptions[0].filter and not any(each.passes_filter(item) for each in subscriptions):
                    continue
                viewer.seen = seq
                if not viewer.queue_event(item):
                    slow.append(viewer)
        for viewer in slow:
            viewer.end_lagging()

    def _on_plugin_state(self, record: LoggedEvent) -> None:
        payload = record.payload()
        if payload.get("name") == "realtime" and payload.get("to") != "active":
            self.reconnect_all()


@functools.lru_cache(maxsize=4096)
def matching_patterns(name: str) -> tuple[str, ...]:
    """Return the event name and every pattern that matches it, for example `a.b.*`, `a.*` and `*` for `a.b.c`."""
    parts = name.split(".")
    return (name, *(".".join(parts[:size]) + ".*" for size in range(len(parts) - 1, 0, -1)), "*")
