"""One connected reader: what it subscribed to, what waits for it, and when it must go."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.auth.visibility import can_read
from corral.events.log import Record
from corral_plugins.realtime.service.frames import frame

FILTERS = ("agent_id", "task_id", "workflow_id", "run_id", "worker_id", "conversation_id", "status", "priority")

BAD_FRAMES, UNAUTHENTICATED, FORBIDDEN, TOO_SLOW, TOO_MANY, RESTART = 4400, 4401, 4403, 4408, 4429, 1012


class Subscription(msgspec.Struct, frozen=True):
    """Names of events and values that their data must have."""

    pattern: str
    names: frozenset[str]
    filter: tuple[tuple[str, Any], ...] = ()

    def matches(self, record: Record) -> bool:
        """Whether the record is asked for."""
        if record.type not in self.names:
            return False
        if not self.filter:
            return True
        data = record.payload()
        return all(data.get(name) == value for name, value in self.filter)


class Viewer:
    """`offer` never blocks: a reader that falls behind by more than `limit` is told where, and goes."""

    def __init__(self, caller: Principal, reread: Callable[[], Principal], limit: int) -> None:
        self.caller, self.reread, self.limit = caller, reread, limit
        self.subscriptions: dict[tuple[str, tuple[tuple[str, Any], ...]], Subscription] = {}
        self.waiting: deque[tuple[int, str, str]] = deque()  # seq, event name, frame
        self.wake = asyncio.Event()
        self.room = asyncio.Event()
        self.ended = asyncio.Event()
        self.close_code: int | None = None
        self.held: list[Record] | None = None  # live events that came while a replay runs
        self.warned = False

    def wants(self, record: Record, among: Iterable[Subscription]) -> bool:
        """Whether it asked for the record and may see it now."""
        return can_read(self.caller, record.visibility, record.owner_id) and any(each.matches(record) for each in among)

    def offer(self, record: Record, encode: Callable[[Record], str]) -> bool:
        """A new event; False when it was dropped because the reader is too slow."""
        if self.close_code is not None:
            return True
        if self.held is not None:
            self.held.append(record)
            return len(self.held) <= self.limit or self._lag(record)
        if not self.wants(record, self.subscriptions.values()):
            return True
        if len(self.waiting) >= self.limit:
            return self._lag(record)
        self.put(record.seq, record.type, encode(record))
        return True

    def put(self, seq: int, name: str, text: str) -> None:
        """Queue a frame."""
        self.waiting.append((seq, name, text))
        self.wake.set()

    def end(self, code: int, last: str | None = None) -> None:
        """The connection must close; `last` is said first."""
        if self.close_code is None:
            self.close_code = code
            if last is not None:
                self.waiting.append((0, "", last))
            self.wake.set()
            self.ended.set()

    def _lag(self, record: Record) -> bool:
        self.waiting.clear()
        self.end(TOO_SLOW, frame("lagged", missed_from=record.seq))
        return False
