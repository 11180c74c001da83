"""The route that streams events as server-sent events (SSE)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.credentials import read_credential
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Forbidden, Gone, Invalid, Unauthorized
from corral.events import log as event_log
from corral.http.answers import Request, Stream
from corral.http.routes import Routes
from corral_plugins.realtime.service.hub import MAX_SUBSCRIPTIONS, ViewerHub
from corral_plugins.realtime.service.messages import Refusal, read_cursor
from corral_plugins.realtime.service.replay import ReplayFactory
from corral_plugins.realtime.service.rights import PERMISSION, ViewerRights
from corral_plugins.realtime.service.stream import EventStream

routes = Routes("/events", tag="Events")


class StreamQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Filters for the event stream.

    `types` accepts event names or patterns such as `task.*` and `*`, either repeated or separated by commas. `after` is
    the `seq` or the id of an event.
    """

    types: Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(max_length=MAX_SUBSCRIPTIONS)] = msgspec.field(
        default_factory=list
    )
    after: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET


@routes.get("/stream", needs=PERMISSION, raises=("unknown_event", "cursor_expired"))
async def stream_events(
    query: StreamQuery,
    caller: Principal,
    request: Request,
    hub: ViewerHub,
    rights: ViewerRights,
    replays: ReplayFactory,
    work: Work,
) -> Stream:
    """Stream events as they happen, as server-sent events.

    The SSE `id` is the event's `seq`. After a disconnect, send the last `id` as `Last-Event-ID` to receive the missed
    events; this header takes precedence over `after`. The following SSE events have no id: `gap` (events are missing,
    because they were too old or there were too many to replay), `token_expiring` (the credential expires soon),
    `lagged` (the stream ends because the client reads too slowly) and `reload` (the stream ends because the server
    restarts).
    """
    patterns = tuple(dict.fromkeys(name for part in query.types for name in part.split(",") if name)) or ("*",)
    cursor = request.header("last-event-id") or (query.after if isinstance(query.after, str) else None)
    pointer = "/header/Last-Event-ID" if request.header("last-event-id") else "/query/after"
    if len(patterns) > MAX_SUBSCRIPTIONS:
        raise Invalid.at("/query/types", "too_long", f"Give at most {MAX_SUBSCRIPTIONS} names.")
    for pattern in patterns:
        _check_pattern(hub, caller, pattern)
    if cursor is not None:
        place = _parse_cursor(cursor, pointer)
        await work(lambda: _check_retained(place), read=True)
    refusal = hub.connection_refusal()
    if refusal is not None:
        raise refusal
    hub.check_connection_limit(caller.user_id or caller.id)
    credential = read_credential(request.header("authorization"), request.header("x-api-key"))
    if credential is None:
        raise Unauthorized("The request has no credential; send the header Authorization: Bearer <token>.")
    viewer = await rights.viewer_for_credential(credential, request.client_ip)
    stream = EventStream(hub, replays, viewer, patterns, cursor)
    return Stream(stream, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def _check_pattern(hub: ViewerHub, caller: Principal, pattern: str) -> None:
    try:
        hub.check_subscription(caller, pattern)
    except Refusal as refusal:
        if refusal.code == "forbidden":
            raise Forbidden(refusal.detail) from None
        raise Invalid.at("/query/types", "not_in_enum", refusal.detail, problem="unknown_event") from None


def _parse_cursor(text: str, pointer: str) -> str:
    try:
        return read_cursor(text)
    except Refusal as refusal:
        raise Invalid.at(pointer, "bad_format", refusal.detail) from None


def _check_retained(cursor: str) -> None:
    """Raise `Gone` (`cursor_expired`) if the log no longer contains all events after the cursor."""
    place, oldest = event_log.seq_of(cursor), event_log.first_seq()
    if place is None or place < oldest - 1:
        detail = "The event log no longer contains the requested events; continue from oldest_seq."
        raise Gone(detail, code="cursor_expired", oldest_seq=oldest)
