"""A connected client with its principal, its subscriptions and its send queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from corral import clock
from corral.auth.principal import Principal
from corral.events.log import LoggedEvent
from corral_plugins.realtime.service.messages import INVALID, TOO_SLOW, CloseFrame, EventFrame, NoticeFrame, Refusal

MAX_RIGHTS_AGE_SECONDS = 1.0
CLOSE_SECONDS, REVOKED_CLOSE_SECONDS = 10.0, 1.0
MAX_ERRORS = 10
UNREAD_MS = 1_000

Key = tuple[str, frozenset[tuple[str, str]]]
Entry = EventFrame | NoticeFrame | CloseFrame
ENTRIES = (EventFrame, NoticeFrame, CloseFrame)


class Subscription:
    """A subscription to an event name or pattern, with a filter.

    All matching events after the position `since` have been sent to the client or are queued. The client already has
    every matching event up to the position `known`, possibly from another process that had read more of the log.
    """

    __slots__ = ("event", "filter", "known", "live", "prefix", "since")

    def __init__(self, event: str, wanted: frozenset[tuple[str, str]], since: int) -> None:
        self.event, self.filter, self.since, self.known = event, wanted, since, 0
        self.prefix = None if event == "*" or not event.endswith(".*") else event[:-1]
        self.live = True

    def matches(self, item: EventFrame) -> bool:
        """Return whether the event matches the name or pattern, and the filter."""
        name = item.record.type
        if self.event not in (name, "*") and (self.prefix is None or not name.startswith(self.prefix)):
            return False
        return not self.filter or self.passes_filter(item)

    def passes_filter(self, item: EventFrame) -> bool:
        """Return whether the event's data matches the filter."""
        payload = item.payload
        return all(payload.get(name) == value for name, value in self.filter)


class Replay(Protocol):
    """An entry in the send queue that replays the event log.

    All events of the replay are sent before the next entry in the queue.
    """

    async def next_part(self) -> Sequence[EventFrame | NoticeFrame] | None:
        """Return the next part of the replay, or None at the end."""
        ...


class Viewer:
    """A connected client. Every method runs on the event loop.

    `queue_entry` and `queue_event` never block. Only the sending task calls `pop_sendable_entry` and `wait_for_entry`.
    """

    def __init__(
        self,
        principal: Principal,
        reread: Callable[[], Principal],
        checked: float,
        limit: int,
        client_ip: str,
        can_read: Callable[[Principal, LoggedEvent], bool],
    ) -> None:
        self.principal, self.reread, self.checked, self.client_ip = principal, reread, checked, client_ip
        self._can_read = can_read
        self.fresh: Callable[[], Awaitable[None]] = _do_nothing  # reloads the principal; set by `ViewerRights`
        self.limit = limit
        self._now = asyncio.get_running_loop().time
        self.subscriptions: dict[Key, Subscription] = {}
        self.seen = 0  # the `seq` of the last live event that was offered
        self.ahead = 0  # the greatest `known` of the subscriptions
        self.queue: deque[Entry | Replay] = deque()
        self.ended = self.left = self.revoked = False
        self.dropped = 0  # events that the connection ended without sending, because the client did not read them
        self.warned_of: float | None = None
        self.on_end: Callable[[Viewer], None] = lambda viewer: None
        self.abort: Callable[[], object] = lambda: None  # cancels a send that waits for the client to read
        self._errors = 0
        self._backlog: deque[EventFrame | NoticeFrame] = deque()
        self._replay: Replay | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def user_key(self) -> str:
        """The id under which the connection counts towards the limits."""
        return self.principal.user_id or self.principal.id

    # -- queueing

    def queue_event(self, item: EventFrame) -> bool:
        """Queue a live event.

        Return False if the queue is full; the caller must then call `end_lagging`.
        """
        if len(self.queue) >= self.limit:
            self.dropped += 1
            return False
        self.queue.append(item)
        if self._waiter is not None:
            self.wake_reader()
        return True

    def queue_entry(self, entry: NoticeFrame | Replay) -> None:
        """Queue a notice or a replay.

        If the queue is full, this method ends the connection, because the client sends requests without reading the
        responses.
        """
        if self.ended:
            return
        if len(self.queue) >= self.limit:
            self.end_lagging()
            return
        self.queue.append(entry)
        self.wake_reader()

    def send_refusal(self, refusal: Refusal) -> None:
        """Send an `error` frame. The tenth `error` frame ends the connection."""
        self._errors += 1
        self.queue_entry(NoticeFrame("error", code=refusal.code, detail=refusal.detail))
        if self._errors >= MAX_ERRORS:
            self.end_connection(INVALID, "ten errors in one connection", keep=True)

    def end_lagging(self) -> None:
        """End a connection that is too slow. Discard its queue, and tell the client the `seq` from which to resume."""
        if self.ended:
            return
        lost = self._undelivered()
        self.dropped += len(lost)
        missed_from = lost[0].record.seq if lost else self.seen + 1
        self.end_connection(TOO_SLOW, "too slow", NoticeFrame("lagged", missed_from=missed_from))

    def _undelivered(self) -> list[EventFrame]:
        return [entry for entry in (*self._backlog, *self.queue) if isinstance(entry, EventFrame)]

    def end_connection(self, code: int, reason: str, last: NoticeFrame | None = None, *, keep: bool = False) -> None:
        """End the connection, unless it has already ended.

        If `last` is given, it is sent before the connection is closed. If `keep` is set, the queued entries are sent
        before `last`; otherwise they are discarded.
        """
        if self.ended:
            return
        self.ended = True
        self.on_end(self)
        if not keep:
            self.queue.clear()
            self._backlog.clear()
            self._replay = None
        if last is not None:
            self.queue.append(last)
        self.queue.append(CloseFrame(code, reason))
        patience = REVOKED_CLOSE_SECONDS if self.revoked else CLOSE_SECONDS
        self._timer = asyncio.get_running_loop().call_later(patience, self.abort)
        self.wake_reader()

    def revoke_access(self, code: int, reason: str) -> None:
        """End the connection because the client lost its permissions. Queued events are discarded."""
        self.revoked = True
        self.end_connection(code, reason)

    def stop_sending(self) -> None:
        """Stop sending, because the client disconnected or the connection ended.

        If the oldest queued event has waited for some time, all queued events count as dropped: the client had stopped
        reading, and the server disconnected it because it did not answer pings.
        """
        self.left = True
        if not self.ended:
            self.ended = True
            lost = self._undelivered()
            if lost and clock.elapsed_ms(lost[0].record.ts, clock.now()) > UNREAD_MS:
                self.dropped = len(lost)
            self.on_end(self)
        if self._timer is not None:
            self._timer.cancel()
        self.wake_reader()

    def wake_reader(self) -> None:
        """Wake up the pending call of `wait_for_entry`, if any."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- sending

    def pop_sendable_entry(self) -> Entry | None:
        """Return the next entry that the current permissions allow, or None if no entry can be sent without waiting."""
        while not self.left:
            source: deque[Any] = self._backlog or self.queue
            if not source or (source is self.queue and (self._replay is not None or type(source[0]) not in ENTRIES)):
                return None
            entry: Entry = source[0]
            if type(entry) is not EventFrame:
                source.popleft()
                return entry
            if self._now() - self.checked > MAX_RIGHTS_AGE_SECONDS:
                return None
            source.popleft()
            if source is self.queue and entry.record.seq <= self.ahead and self._was_seen(entry):
                continue
            if not self.revoked and self._can_read(self.principal, entry.record):
                return entry
        return None

    def _was_seen(self, item: EventFrame) -> bool:
        """Return whether the client has already received the event through every subscription that matches it."""
        return all(item.record.seq <= each.known for each in self.subscriptions.values() if each.matches(item))

    async def wait_for_entry(self, idle_seconds: float | None = None) -> Entry | None:
        """Wait for the next entry and return it.

        Return None if no entry arrives within `idle_seconds`, or if the client has disconnected.
        """
        while not self.left:
            entry = self.pop_sendable_entry()
            if entry is not None:
                return entry
            if self._backlog:
                await self.fresh()
            elif self._replay is not None:
                await self._continue_replay(self._replay)
            elif not self.queue:
                if not await self._wait_for_wake(idle_seconds):
                    return None
            elif isinstance(self.queue[0], ENTRIES):
                await self.fresh()
            else:
                self._replay = self.queue.popleft()  # type: ignore[assignment]  # the only other kind is a replay
        return None

    async def _continue_replay(self, replay: Replay) -> None:
        part = await replay.next_part()
        if self._replay is not replay:  # the connection ended in the meantime
            return
        if part is None:
            self._replay = None
        else:
            self._backlog.extend(part)

    async def _wait_for_wake(self, seconds: float | None) -> bool:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if seconds is None:
                await self._waiter
            else:
                async with asyncio.timeout(seconds):
                    await self._waiter
        except TimeoutError:
            return False
        finally:
            self._waiter = None
        return True


async def _do_nothing() -> None:
    await asyncio.sleep(0)
