"""`GET /events/stream`: the same events over SSE."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.credentials import read_credential
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Gone, Invalid, Unavailable
from corral.events import log as event_log
from corral.http.answers import Request, Stream
from corral.http.routes import Routes
from corral.ids import parse_id
from corral_plugins.realtime.service.hub import Hub
from corral_plugins.realtime.service.viewer import Subscription, Viewer

routes = Routes("/events", tag="Events")

COMMENT_EVERY = 15.0
RETRY = b"retry: 2000\n\n"


class StreamQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`types`: names or patterns, repeated or with commas; `after`: a `seq` or an event's id."""

    types: list[Annotated[str, msgspec.Meta(max_length=100)]] = msgspec.field(default_factory=list)
    after: Annotated[str, msgspec.Meta(max_length=64)] | UnsetType = UNSET


@routes.get(
    "/stream",
    needs="realtime.read",
    raises=("unknown_event", "cursor_expired", "concurrency_limit", "overloaded"),
    stream=True,
)
async def stream_events(query: StreamQuery, caller: Principal, request: Request, hub: Hub, work: Work) -> Stream:
    """Follow events live; `Last-Event-ID` or `after` go on from a place."""
    patterns = [name for part in query.types for name in part.split(",") if name] or ["*"]
    for pattern in patterns:
        if not hub.types.knows(pattern):
            raise Invalid.at("/query/types", "not_in_enum", f"No event is named {pattern}.", problem="unknown_event")
    given = request.header("last-event-id") or (query.after if isinstance(query.after, str) else None)
    place = await work(lambda: _place(given), read=True) if given is not None else None
    if hub.full:
        raise Unavailable("This process has as many connections as it takes.", code="overloaded")
    credential = read_credential(request.header("authorization"), request.header("x-api-key")) or ""
    caller, reread = await hub.authenticate(credential)
    viewer = hub.join(caller, reread)
    subscription = Subscription(",".join(patterns), frozenset(hub.types.expand(patterns)))
    return Stream(_chunks(hub, viewer, subscription, place), headers={"X-Accel-Buffering": "no"})


async def _chunks(hub: Hub, viewer: Viewer, subscription: Subscription, place: int | None) -> AsyncIterator[bytes]:
    replaying: asyncio.Task[int] | None = None
    try:
        hub.subscribe(viewer, subscription)
        if place is not None:
            replaying = asyncio.ensure_future(hub.replay(viewer, place, [subscription]))
        yield RETRY
        while viewer.close_code is None:
            try:
                async with asyncio.timeout(COMMENT_EVERY):
                    await viewer.wake.wait()
            except TimeoutError:
                yield b": still here\n\n"
            viewer.wake.clear()
            while viewer.waiting and viewer.close_code is None:
                seq, name, text = viewer.waiting.popleft()
                viewer.room.set()
                if seq:
                    yield f"id: {seq}\nevent: {name}\ndata: {text}\n\n".encode()
    finally:
        if replaying is not None:
            replaying.cancel()
        hub.leave(viewer)


def _place(given: str) -> int:
    place = event_log.seq_of(given)
    oldest = event_log.first_seq()
    if place is None and parse_id(given) is None:
        raise Invalid.at("/query/after", "bad_format", "Give the seq or the id of an event.")
    if place is None or place < oldest - 1:
        detail = "The log no longer reaches back that far; read on from oldest_seq."
        raise Gone(detail, code="cursor_expired", oldest_seq=oldest)
    return place
