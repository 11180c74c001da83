"""Serves a viewer over server-sent events (SSE)."""

from __future__ import annotations

import asyncio

from corral.errors import TooMany
from corral_plugins.realtime.service.hub import ViewerHub
from corral_plugins.realtime.service.messages import CloseFrame, Refusal
from corral_plugins.realtime.service.replay import ReplayFactory
from corral_plugins.realtime.service.viewer import Viewer

COMMENT_SECONDS = 15.0
RETRY = b"retry: 2000\n"  # part of the first event: many parsers deliver a block without data as an empty message
BATCH_SIZE = 64


class EventStream:
    """An asynchronous iterator over the chunks of one event stream.

    The viewer is registered with the hub only when the first chunk is read, so a stream that is never read needs no
    cleanup.
    """

    def __init__(
        self, hub: ViewerHub, replays: ReplayFactory, viewer: Viewer, patterns: tuple[str, ...], cursor: str | None
    ) -> None:
        self._hub, self._replays, self._viewer = hub, replays, viewer
        self._patterns, self._cursor = patterns, cursor
        self._begun = self._over = False
        self._prefix = RETRY

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        if not self._begun:
            return self._start_stream()
        if self._over:
            raise StopAsyncIteration
        entry = await self._viewer.wait_for_entry(COMMENT_SECONDS)
        if entry is None:
            if self._viewer.left:
                raise StopAsyncIteration
            return b": still here\n\n"
        parts: list[bytes] = []
        while entry is not None:
            if isinstance(entry, CloseFrame):
                self._over = True
                break
            parts.append(self._prefix + entry.sse_block)
            self._prefix = b""
            entry = self._viewer.pop_sendable_entry() if len(parts) < BATCH_SIZE else None
        if not parts:
            raise StopAsyncIteration
        return b"".join(parts)

    async def aclose(self) -> None:
        """Remove the viewer from the hub, because the client disconnected or the stream ended."""
        self._over = True
        self._hub.remove_viewer(self._viewer)

    def _start_stream(self) -> bytes:
        self._begun = True
        sending = asyncio.current_task()
        assert sending is not None
        self._viewer.abort = sending.cancel
        try:
            self._hub.add_viewer(self._viewer)
            made = [self._hub.subscribe(self._viewer, pattern) for pattern in self._patterns]
        except (TooMany, Refusal):  # the request passed both checks, and the state has changed since
            self._over = True
        else:
            if self._cursor is not None:
                self._viewer.queue_entry(self._replays.create_replay(self._viewer, self._cursor, made))
        return b": connected\n\n"
