"""Lists and streams the events of a run from the event log."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Gone, Invalid
from corral.events import log as event_log
from corral.events.live_feed import Feed
from corral.events.log import EventRow, EventView, LoggedEvent
from corral.http.page import Page
from corral.ids import parse_id
from corral.schema.conversion import encode
from corral_plugins.workflows.service.run_state import FINAL_RUN
from corral_plugins.workflows.service.runs import find_readable_run

BATCH = 200
STREAM_SECONDS = 30.0
COMMENT_SECONDS = 10.0


class RunEvents:
    """Reads the events of a run."""

    def __init__(self, work: Work, feed: Feed) -> None:
        self._work, self._feed = work, feed

    async def list(self, run_id: str, cursor: str | None, limit: int, *, by: Principal) -> Page[EventView]:
        """Return the events of a run after the position `cursor`, oldest first.

        Raise `NotFound` if the caller may not read the run.
        """
        records, place, _ = await self._work(lambda: _read(run_id, cursor, limit, by), read=True)
        items = [record.view() for record in records]
        return Page(items=items, total=None, limit=limit, offset=None, next=str(place))

    async def stream(self, run_id: str, cursor: str | None, *, by: Principal) -> AsyncIterator[bytes]:
        """Return a stream of the run's events after the position `cursor`, as chunks of bytes.

        Raise `NotFound` if the caller may not read the run.
        """
        await self._work(lambda: _read(run_id, cursor, 1, by), read=True)
        return self._chunks(run_id.lower(), cursor, by)

    async def _chunks(self, run_id: str, cursor: str | None, by: Principal) -> AsyncIterator[bytes]:
        until = clock.time_s() + STREAM_SECONDS
        yield b"retry: 1000\n\n"
        with self._feed.subscribe((run_id,)) as notified:
            while clock.time_s() < until:
                notified.clear()
                records, place, is_final = await self._work(
                    functools.partial(_read, run_id, cursor, BATCH, by), read=True
                )
                if records:
                    cursor = str(place)
                    yield b"".join(_sse_block(record) for record in records)
                if is_final and len(records) < BATCH:
                    return
                if not records:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(COMMENT_SECONDS, max(0.0, until - clock.time_s()))):
                            await notified.wait()
                    if not notified.is_set():
                        yield b": still here\n\n"


def _read(run_id: str, cursor: str | None, limit: int, by: Principal) -> tuple[list[LoggedEvent], int, bool]:
    """Return events of a run, the position after these events, and whether the run had ended before they were read."""
    run = find_readable_run(run_id, by)
    after, newest = _parse_cursor(cursor), event_log.last_seq()
    records = event_log.select([EventRow.seq > after, EventRow.object_id == run.id], limit)
    place = records[-1].seq if records else max(after, newest)
    return records, place, run.status in FINAL_RUN


def _parse_cursor(cursor: str | None) -> int:
    if cursor is None:
        return 0
    place = event_log.seq_of(cursor)
    if place is None and parse_id(cursor) is None:
        raise Invalid.at("/query/after", "bad_format", "`after` must be the seq or the id of an event.")
    if place is None or place < event_log.first_seq() - 1:
        raise Gone(
            "The event log no longer contains the requested events; fetch the run instead.", code="cursor_expired"
        )
    return place


def _sse_block(record: LoggedEvent) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (record.seq, record.type.encode(), encode(record.view()))
