"""`/events`: the event log as lists and long polls."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.auth.principal import ANY_CALLER, Principal
from corral.errors import Forbidden, Gone, Invalid
from corral.events import log as event_log
from corral.events.log import EventRow, EventView
from corral.events.registry import EventTypes
from corral.http.answers import Wait
from corral.http.page import Page
from corral.http.routes import Routes
from corral.ids import parse_id
from corral_core.event_log.service import EventRightsService

routes = Routes("/events", tag="Events")

WINDOW = 20_000  # so many places of the log are looked through for one answer: a name may be rare, a log long


class EventQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`after` is a `seq` or an event's id; `wait` seconds long an empty answer is held back."""

    after: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    types: list[Annotated[str, Meta(max_length=100)]] = msgspec.field(default_factory=list)
    object_type: Annotated[str, Meta(max_length=60)] | UnsetType = UNSET
    object_id: Annotated[str, Meta(max_length=80)] | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    wait: Annotated[int, Meta(ge=0, le=30)] = 0

    @functools.cached_property
    def until(self) -> float:
        """When a long poll must answer; fixed at its first look, for the handler runs again at every bell."""
        return clock.time_s() + self.wait


class EventTypeView(msgspec.Struct, kw_only=True):
    """A kind of event and the JSON Schema of its `data`."""

    event: str
    title: str
    plugin: str
    visibility: str
    schema: dict[str, Any]


class EventTypeList(msgspec.Struct, kw_only=True):
    """By name."""

    items: list[EventTypeView]


@routes.get("/", needs=ANY_CALLER, raises=("unknown_event", "cursor_expired"), seconds=60.0)
def list_events(
    query: EventQuery, caller: Principal, types: EventTypes, rights: EventRightsService
) -> Page[EventView] | Wait:
    """Events that the caller may see, oldest first; `next` is the place to go on from, always.

    At most 20,000 places of the log are looked through, so before its end too a page may have fewer events than
    `limit`, or none: ask on from `next`. A key or token sees those of areas of which it may read the objects, and a key
    its owner's own account.
    """
    if caller.kind == "worker":
        raise Forbidden("Workers have their own signals.")
    names = _names(query.types, types)
    after = _place(query.after)
    newest = event_log.last_seq()  # before the events: what comes between the two reads must not be skipped
    where = [EventRow.seq > after, rights.where(caller)]
    if names is not None:
        where.append(EventRow.type.in_(names))
    if isinstance(query.object_type, str):
        where.append(EventRow.object_type == query.object_type)
    until = newest
    if isinstance(query.object_id, str):  # there is an index
        where.append(EventRow.object_id == query.object_id.lower())
    else:
        until = min(newest, max(after, event_log.first_seq() - 1) + WINDOW)
    where.append(EventRow.seq <= until)
    records = event_log.select(where, query.limit)
    is_ahead = after > newest  # of a log before a backup was restored: the client goes on from the end of this one
    if not records and query.wait and until == newest and not is_ahead and clock.time_s() < query.until:
        return Wait(names if names is not None else types.expand(["*"]), query.until)
    place = records[-1].seq if len(records) == query.limit else until
    return Page(
        items=[record.view() for record in records], total=None, limit=query.limit, offset=None, next=str(place)
    )


@routes.get("/types", needs=ANY_CALLER)
async def list_event_types(types: EventTypes) -> EventTypeList:
    """The catalogue: every event with its visibility and the schema of its data."""
    return EventTypeList(items=_catalogue(types))


def _catalogue(types: EventTypes) -> list[EventTypeView]:
    return [
        EventTypeView(
            event=each.event,
            title=each.title,
            plugin=each.plugin,
            visibility=each.visibility,
            schema=msgspec.json.schema(each.payload),
        )
        for each in types.all()
    ]


def _names(patterns: list[str], types: EventTypes) -> list[str] | None:
    """The event names that are asked for; None: all."""
    wanted = [name for pattern in patterns for name in pattern.split(",") if name]
    for pattern in wanted:
        if not types.knows(pattern):
            raise Invalid.at("/query/types", "not_in_enum", f"No event is named {pattern}.", problem="unknown_event")
    return types.expand(wanted) if wanted else None


def _place(after: str | UnsetType) -> int:
    """The `seq` after which to read; `cursor_expired` when events between it and the log's beginning are gone."""
    if isinstance(after, UnsetType):
        return 0
    place = event_log.seq_of(after)
    oldest = event_log.first_seq()
    if place is None and parse_id(after) is None:
        raise Invalid.at("/query/after", "bad_format", "Give the seq or the id of an event.")
    if place is None or place < oldest - 1:
        detail = "The log no longer reaches back that far; read on from oldest_seq."
        raise Gone(detail, code="cursor_expired", oldest_seq=oldest)
    return place
