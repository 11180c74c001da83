"""The durable event log: one table, to which events are written in the same transaction as the change they report.

The `ins` column numbers the insertions. The `seq` column defines the order in which readers see the events. On SQLite,
the writer assigns `seq` before COMMIT. On PostgreSQL, the sequencer assigns it to committed rows, so that a later
number never becomes visible before an earlier one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.model import IdField, InstantField, Model
from corral.database.statement import Statement
from corral.database.unit import current

SEQUENCER_LOCK = 0x434F5252_53455151
NUMBER_BATCH = 1000


class EventRow(Model):
    """A row of the event log."""

    ins = peewee.BigAutoField()
    seq = peewee.BigIntegerField(null=True, unique=True)
    id = IdField(unique=True)
    type = peewee.CharField(max_length=100)
    ts = InstantField()
    actor_type = peewee.CharField(max_length=20)
    actor_id = peewee.CharField(max_length=80, null=True)
    object_type = peewee.CharField(max_length=60)
    object_id = peewee.CharField(max_length=80)
    owner_id = IdField(null=True)
    visibility = peewee.CharField(max_length=20)
    data = peewee.TextField()
    cause = peewee.TextField(default="[]")

    class Meta:
        table_name = "kernel_events"
        indexes = ((("object_id", "ins"), False),)


class EventView(msgspec.Struct, kw_only=True):
    """An event in API responses and streams. Clients use `seq` as their cursor, and `id` to identify the event."""

    event: str
    id: str
    seq: int
    ts: str
    data: Any
    actor: dict[str, str | None]
    object: dict[str, str]
    visibility: str
    cause_chain: Any


class LoggedEvent(msgspec.Struct, frozen=True):
    """An event as read from the log. `data` is JSON text.

    `cause` is a JSON list with the ids of the objects, such as triggers and tasks, that led to the event.
    """

    seq: int
    id: str
    type: str
    ts: str
    actor_type: str
    actor_id: str | None
    object_type: str
    object_id: str
    owner_id: str | None
    visibility: str
    data: str
    cause: str

    def payload(self) -> dict[str, Any]:
        """Return the decoded `data`."""
        return msgspec.json.decode(self.data, type=dict[str, Any])

    def view(self) -> EventView:
        """Return the event in the form used by lists, `/ws` and SSE."""
        return EventView(
            event=self.type,
            id=self.id,
            seq=self.seq,
            ts=self.ts,
            data=msgspec.Raw(self.data),
            actor={"type": self.actor_type, "id": self.actor_id},
            object={"type": self.object_type, "id": self.object_id},
            visibility=self.visibility,
            cause_chain=msgspec.Raw(self.cause),
        )


COLUMNS = tuple(getattr(EventRow, name) for name in LoggedEvent.__struct_fields__)


_INSERT = Statement(lambda p: EventRow.insert({field: p(field.name) for field in EventRow._meta.sorted_fields[1:]}))
LAST = EventRow.select(peewee.fn.COALESCE(peewee.fn.MAX(EventRow.seq), 0))
_IN_ORDER: Any = EventRow.select(*COLUMNS).order_by(EventRow.seq).tuples()


def _events_after(events: peewee.Query) -> Statement:
    return Statement(lambda p: events.where(EventRow.seq > p("after")).limit(p("limit")))


_READ = _events_after(_IN_ORDER)
_LAST = Statement(lambda p: LAST.tuples())
_FIRST = Statement(lambda p: EventRow.select(peewee.fn.COALESCE(peewee.fn.MIN(EventRow.seq), 0)).tuples())


def write_events(events: Sequence[Mapping[str, Any]]) -> None:
    """Insert the events of a transaction.

    This function is called at the end of the transaction, after its units of work have written their rows, audit rows
    and jobs.
    """
    # On SQLite, the writer holds the only write lock, so the insertion order is the order of the log.
    numbers = itertools.count(last_seq() + 1) if current().database.kind == "sqlite" else itertools.repeat(None)
    ts = clock.now()
    _INSERT.run_many([{**event, "ts": ts, "seq": seq} for event, seq in zip(events, numbers, strict=False)])


def number_committed() -> int:
    """Assign sequence numbers to committed rows in insertion order, and return the number of these rows.

    Call this function only on PostgreSQL, in a separate unit of work. It returns 0 while another process is assigning
    numbers.
    """
    connection = current().connection
    if not connection.execute("SELECT pg_try_advisory_xact_lock(%s)", (SEQUENCER_LOCK,)).fetchone()[0]:
        return 0
    cursor = connection.execute(
        "UPDATE kernel_events AS e SET seq = n.seq FROM ("
        " SELECT ins, (SELECT coalesce(max(seq), 0) FROM kernel_events) + row_number() OVER (ORDER BY ins) AS seq"
        " FROM (SELECT ins FROM kernel_events WHERE seq IS NULL ORDER BY ins LIMIT %s) AS waiting"
        ") AS n WHERE e.ins = n.ins",
        (NUMBER_BATCH,),
    )
    return int(cursor.rowcount)


def read(after: int, limit: int = 500) -> list[LoggedEvent]:
    """Return up to `limit` events with `seq > after`, in order."""
    return [LoggedEvent(*row) for row in _READ.rows({"after": after, "limit": limit})]


def select(where: Sequence[Any], limit: int) -> list[LoggedEvent]:
    """Return up to `limit` events that satisfy all conditions, in order."""
    return [LoggedEvent(*row) for row in _IN_ORDER.where(EventRow.seq.is_null(False), *where).limit(limit)]


def of_types(types: Sequence[str]) -> Statement:
    """Return a statement that reads the first events of these types, in order.

    The statement's parameters `after` and `limit` select up to `limit` events with `seq > after`.
    """
    return _events_after(_IN_ORDER.where(EventRow.type.in_(types)))


def last_seq() -> int:
    """Return the highest sequence number, or 0 for an empty log."""
    return int(_LAST.rows({})[0][0])


def first_seq() -> int:
    """Return the lowest sequence number that is still in the log, or 0 for an empty log."""
    return int(_FIRST.rows({})[0][0])


def seq_of(cursor: str) -> int | None:
    """Return the `seq` to which a client's cursor (a number or an event id) refers.

    Return None if the cursor is invalid, or if it is the id of an event that the log no longer contains.
    """
    if cursor.isascii() and cursor.isdigit():
        return int(cursor) if len(cursor) < 19 else None
    row = EventRow.select(EventRow.seq).where(EventRow.id == cursor.lower()).tuples().first()
    return int(row[0]) if row and row[0] is not None else None
