"""Routes under `/events`, which read the event log in pages or by long polling."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.auth.principal import ANY_CALLER, Principal
from corral.errors import Forbidden, Gone, Invalid
from corral.events import log as event_log
from corral.events.event import EventType, EventTypes
from corral.events.log import EventRow, EventView
from corral.http.answers import Wait
from corral.http.page import Page
from corral.http.routes import Routes
from corral.ids import parse_id
from corral_core.event_log.service import EventRightsService

routes = Routes("/events", tag="Events")

WINDOW = 20_000  # positions of the log searched for one response, because events of a rare type may be far apart


class EventQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Filters for reading the event log.

    `after` is the `seq` or the id of an event: only later events are returned. If there are none yet, the server waits
    at most `wait` seconds before it sends an empty response (long polling).
    """

    after: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    types: list[Annotated[str, Meta(max_length=100)]] = msgspec.field(default_factory=list)
    object_type: Annotated[str, Meta(max_length=60)] | UnsetType = UNSET
    object_id: Annotated[str, Meta(max_length=80)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    wait: Annotated[int, Meta(ge=0, le=30)] = 0

    @functools.cached_property
    def poll_deadline(self) -> float:
        """The deadline of the long poll, in seconds since the epoch.

        It is computed only once, because the handler runs again after every notification.
        """
        return clock.time_s() + self.wait


class EventTypeView(msgspec.Struct, kw_only=True):
    """An event type and the JSON Schema of its `data`."""

    event: str
    title: str
    plugin: str
    visibility: str
    schema: dict[str, Any]


class EventTypeList(msgspec.Struct, kw_only=True):
    """All event types, sorted by name."""

    items: list[EventTypeView]


@routes.get("/", needs=ANY_CALLER, raises=("unknown_event", "cursor_expired"), seconds=60.0)
def list_events(
    query: EventQuery, caller: Principal, types: EventTypes, rights: EventRightsService
) -> Page[EventView] | Wait:
    """List events that the caller may read, oldest first. `next` is always the position to continue from.

    Without the `object_id` filter, one request searches at most 20,000 positions of the log, so a page may contain
    fewer events than `limit`, or none, although the log contains more. Continue from `next`. An API key or token can
    read events about objects that it may read. An API key can also read events about its owner's account.
    """
    if caller.kind == "worker":
        raise Forbidden("Workers cannot read the event log; they receive signals from GET /workers/{id}/signals.")
    names = _expand_patterns(query.types, types)
    after = _seq_after(query.after)
    newest = event_log.last_seq()  # read before the events, so that events between the two reads are not skipped
    where = [EventRow.seq > after, rights.where(caller)]
    if names is not None:
        where.append(EventRow.type.in_(names))
    if isinstance(query.object_type, str):
        where.append(EventRow.object_type == query.object_type)
    until = newest
    if isinstance(query.object_id, str):  # an index exists, so the whole log is searched
        where.append(EventRow.object_id == query.object_id.lower())
    else:
        until = min(newest, max(after, event_log.first_seq() - 1) + WINDOW)
    where.append(EventRow.seq <= until)
    records = event_log.select(where, query.limit)
    is_ahead = after > newest  # a backup was restored meanwhile: the client continues from the end of this log
    if not records and query.wait and until == newest and not is_ahead and clock.time_s() < query.poll_deadline:
        return Wait(names if names is not None else types.expand(["*"]), query.poll_deadline)
    place = records[-1].seq if len(records) == query.limit else until
    return Page(
        items=[record.view() for record in records], total=None, limit=query.limit, offset=None, next=str(place)
    )


@routes.get("/types", needs=ANY_CALLER)
async def list_event_types(types: EventTypes) -> EventTypeList:
    """List all event types with their visibility and the schema of their data."""
    return EventTypeList(items=[_event_type_view(each) for each in types.all()])


@functools.lru_cache(maxsize=1000)  # describing all events takes 20 ms, on the event loop
def _event_type_view(kind: EventType) -> EventTypeView:
    return EventTypeView(
        event=kind.event,
        title=kind.title,
        plugin=kind.plugin,
        visibility=kind.visibility,
        schema=msgspec.json.schema(kind.payload),
    )


def _expand_patterns(patterns: list[str], types: EventTypes) -> list[str] | None:
    """Return the names of the requested event types, or None if all types are requested.

    Raise `Invalid` (`unknown_event`) for an unknown pattern.
    """
    wanted = [name for pattern in patterns for name in pattern.split(",") if name]
    for pattern in wanted:
        if not types.is_known(pattern):
            raise Invalid.at("/query/types", "not_in_enum", f"No event is named {pattern}.", problem="unknown_event")
    return types.expand(wanted) if wanted else None


def _seq_after(after: str | UnsetType) -> int:
    """Return the `seq` after which to read. Raise `Gone` (`cursor_expired`) if any later events have been deleted."""
    if isinstance(after, UnsetType):
        return 0
    place = event_log.seq_of(after)
    oldest = event_log.first_seq()
    if place is None and parse_id(after) is None:
        raise Invalid.at("/query/after", "bad_format", "`after` must be the seq or the id of an event.")
    if place is None or place < oldest - 1:
        detail = "The event log no longer contains the requested events; continue from oldest_seq."
        raise Gone(detail, code="cursor_expired", oldest_seq=oldest)
    return place
