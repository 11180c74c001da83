"""Reads for clients: the list of tasks, statistics, and the details of one task.

Indexes and counters answer the frequent queries, so that their cost does not depend on the size of the table.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import NO_ROWS, can_read, visible
from corral.database.dialect import milliseconds_between
from corral.database.model import SHARED
from corral.database.statement import Statement
from corral.errors import NotFound
from corral.events.log import COLUMNS as EVENT_COLUMNS
from corral.events.log import EventRow, EventView, LoggedEvent
from corral.http.page import Order, Page, PageQuery, check_place, paginate, read_cursor, write_cursor
from corral_plugins.tasks.models import PRIORITIES, STATUSES, Attempt, Comment, PageAnchor, Task, TaskRow
from corral_plugins.tasks.service import rollups, rows, search
from corral_plugins.tasks.service.views import Views
from corral_plugins.tasks.shapes import AttemptView, CommentView, Stats, StatsQuery, TaskQuery

ANCHOR_INTERVAL = 5000
SETTLED_SECONDS = 60
BEFORE_ALL = ("", "")

_ANCHORS = Statement(
    lambda p: (
        PageAnchor.select(PageAnchor.created_at, PageAnchor.task_id, PageAnchor.n)
        .order_by(PageAnchor.created_at, PageAnchor.task_id)
        .tuples()
    )
)
_LAST = Statement(
    lambda p: (
        PageAnchor.select(PageAnchor.created_at, PageAnchor.task_id)
        .order_by(PageAnchor.created_at.desc(), PageAnchor.task_id.desc())
        .limit(1)
        .tuples()
    )
)
_NTH_AFTER = Statement(
    lambda p: (
        Task.select(Task.created_at, Task.id)
        .where(_after(p("created_at"), p("id")))
        .order_by(Task.created_at, Task.id)
        .limit(1)
        .offset(p("offset"))
        .tuples()
    )
)
_INSERT = Statement(
    lambda p: PageAnchor.insert(
        {PageAnchor.created_at: p("created_at"), PageAnchor.task_id: p("id"), PageAnchor.n: ANCHOR_INTERVAL}
    ).on_conflict_ignore()
)
_LESS = Statement(
    lambda p: PageAnchor.update({PageAnchor.n: PageAnchor.n - 1}).where(
        (PageAnchor.created_at == p("anchor_at")) & (PageAnchor.task_id == p("anchor_id"))
    )
)
_COVERING = Statement(
    lambda p: (
        PageAnchor.select(PageAnchor.created_at, PageAnchor.task_id)
        .where(
            (PageAnchor.created_at > p("created_at"))
            | ((PageAnchor.created_at == p("created_at")) & (PageAnchor.task_id >= p("id")))
        )
        .order_by(PageAnchor.created_at, PageAnchor.task_id)
        .limit(1)
        .tuples()
    )
)


def _after(created_at: Any, task_id: Any) -> Any:
    return (Task.created_at >= created_at) & (
        (Task.created_at > created_at) | ((Task.created_at == created_at) & (Task.id > task_id))
    )


def anchored_place(position: int) -> tuple[str, str] | None:
    """Return the sort key of the task that has exactly `position` older tasks, or None if there is no such task."""
    start, left = BEFORE_ALL, position
    for created_at, task_id, n in _ANCHORS.rows({}):
        if n > left:
            break
        start, left = (created_at, task_id), left - n
    found = _NTH_AFTER.one({"created_at": start[0], "id": start[1], "offset": left})
    return None if found is None else (found[0], found[1])


def extend_anchors() -> bool:
    """Write the next page anchor if enough settled tasks follow the last one. Return whether an anchor was written.

    Tasks are settled if they were created more than 60 s ago: no commit can add another task before them.
    """
    last = _LAST.one({}) or BEFORE_ALL
    found = _NTH_AFTER.one({"created_at": last[0], "id": last[1], "offset": ANCHOR_INTERVAL - 1})
    if found is None or found[0] > clock.now(-SETTLED_SECONDS):
        return False
    _INSERT.run({"created_at": found[0], "id": found[1]})
    return True


def anchor_removed(created_at: str, task_id: str) -> None:
    """Subtract a deleted task from the count of the page anchor that covers its position."""
    anchor = _COVERING.one({"created_at": created_at, "id": task_id})
    if anchor is not None:
        _LESS.run({"anchor_at": anchor[0], "anchor_id": anchor[1]})


SCOPE = "tasks"

_NEWEST = Statement(
    lambda p: (
        Task.select(Task.id, Task.version, Task.created_at)
        .order_by(Task.created_at.desc(), Task.id.desc())
        .limit(p("limit"))
        .tuples()
    )
)
_OLDER = Statement(
    lambda p: (
        Task.select(Task.id, Task.version, Task.created_at)
        .where(
            (Task.created_at <= p("created_at"))
            & ((Task.created_at < p("created_at")) | ((Task.created_at == p("created_at")) & (Task.id < p("id"))))
        )
        .order_by(Task.created_at.desc(), Task.id.desc())
        .limit(p("limit"))
        .tuples()
    )
)
# A position near the newest task is found in the index alone; only the rows of the page are read.
_PLACE = Statement(
    lambda p: (
        Task.select(Task.created_at, Task.id)
        .order_by(Task.created_at.desc(), Task.id.desc())
        .limit(1)
        .offset(p("offset"))
        .tuples()
    )
)
NEAR = 2000
_WAITING = Statement(
    lambda p: (
        Task.select(Task.waiting_kind, peewee.fn.COUNT(Task.id))
        .where(peewee.SQL("status = 'waiting'"))
        .group_by(Task.waiting_kind)
        .tuples()
    )
)


ATTEMPT_VIEW_COLUMNS = [
    column
    for column in Attempt._meta.sorted_fields
    if column.name not in ("checkpoint", "result", "token_hash", "lease_id")
]


class TaskQueries:
    """Reads tasks for clients. Runs in the caller's unit of work."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def page(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        """Return a page of the list of tasks."""
        check_place(query)
        if query.__class__ is TaskQuery and _is_plain(query):
            return self._newest(query, caller)
        if isinstance(query.search, str) and _is_plain(query, but="search") and can_read(caller, SHARED, None):
            return self._searched(query, search.words_of(query.search), caller)
        return self._filtered(query, caller)

    # -- the plain list

    def _newest(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        total = sum(rollups.status_counts().values())
        if not can_read(caller, SHARED, None):
            return Page(items=[], total=0, limit=query.limit, offset=query.offset or 0, next=None)
        offset: int | None = None
        if isinstance(query.cursor, str):
            created_at, task_id = read_cursor(query.cursor, SCOPE, caller, PLAIN)
            found = _OLDER.rows({"created_at": created_at, "id": task_id, "limit": query.limit + 1})
        else:
            offset = query.offset if isinstance(query.offset, int) else 0
            found = self._from(offset, query.limit + 1, total)
        following = None
        if len(found) > query.limit:
            found.pop()
            following = write_cursor(SCOPE, caller, PLAIN, [found[-1][2], found[-1][0]])
        items = self._views.items((row[0], row[1]) for row in found)
        return Page(items=items, total=total, limit=query.limit, offset=offset, next=following)

    @staticmethod
    def _from(offset: int, limit: int, total: int) -> list[tuple[Any, ...]]:
        """Return the rows from `offset` on.

        Large offsets are found through page anchors, which count from the oldest task.
        """
        if offset == 0:
            return _NEWEST.rows({"limit": limit})
        if offset <= NEAR:
            place = _PLACE.one({"offset": offset - 1})
        else:
            place = anchored_place(total - offset) if offset <= total else None
        return [] if place is None else _OLDER.rows({"created_at": place[0], "id": place[1], "limit": limit})

    # -- by words alone

    def _searched(self, query: TaskQuery, words: list[str], caller: Principal) -> Page[Any]:
        """Return a page of the search results.

        Tasks that are not indexed yet come first, because they are newer than all indexed tasks.
        """
        if not words:
            return Page(items=[], total=0, limit=query.limit, offset=query.offset or 0, next=None)
        scope, fingerprint = f"{SCOPE}.search", query.fingerprint()
        newer, known, limit = search.newer(words), search.query_of(words), query.limit + 1
        total = min(len(newer) + search.count(known), search.CAP)
        offset: int | None = None
        if isinstance(query.cursor, str):
            created_at, task_id = read_cursor(query.cursor, scope, caller, fingerprint)
            found = [row for row in newer if (row[2], row[0]) < (created_at, task_id)][:limit]
            found += search.indexed(known, limit=limit - len(found), before=(created_at, task_id))
        else:
            offset = query.offset if isinstance(query.offset, int) else 0
            found = newer[offset : offset + limit]
            skipped = max(0, offset - len(newer))
            if skipped < search.CAP:
                found += search.indexed(known, limit=limit - len(found), offset=skipped)
        following = None
        if len(found) > query.limit:
            found.pop()
            following = write_cursor(scope, caller, fingerprint, [found[-1][2], found[-1][0]])
        items = self._views.items((row[0], row[1]) for row in found)
        return Page(items=items, total=total, limit=query.limit, offset=offset, next=following)

    # -- with filters

    def _filtered(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        where, counted = _conditions(query)
        allowed = visible(Task, caller)
        columns = (Task.id, Task.version, Task.created_at, Task.updated_at, Task.priority)
        select = Task.select(*columns).where(allowed, *where).namedtuples()
        order = {
            "created": (Order(Task.created_at), Order(Task.id)),
            "updated": (Order(Task.updated_at), Order(Task.id)),
            "priority": (Order(Task.priority), Order(Task.created_at), Order(Task.id)),
        }[query.sort]
        total = sum(n for key, n in rollups.status_counts().items() if counted(*key)) if _is_counted(query) else None
        if allowed is NO_ROWS:
            total = 0
        page = paginate(
            select, query, caller, scope=SCOPE, order=order, make=lambda row: (row.id, row.version), total=total
        )
        return Page(
            items=self._views.items(page.items), total=page.total, limit=page.limit, offset=page.offset, next=page.next
        )

    # -- one task; `NotFound` when the caller cannot see it

    def attempts(self, task_id: str, query: PageQuery, caller: Principal) -> Page[AttemptView]:
        """Return the attempts of a task, oldest first."""
        readable(task_id, caller)
        select = Attempt.select(*ATTEMPT_VIEW_COLUMNS).where(Attempt.task_id == task_id)
        order = (Order(Attempt.fence, descending=False),)
        return paginate(select, query, caller, scope=f"attempts:{task_id}", order=order, make=attempt_view)

    def attempt(self, task_id: str, fence: int, caller: Principal) -> AttemptView:
        """Return one attempt of a task."""
        readable(task_id, caller)
        where = (Attempt.task_id == task_id) & (Attempt.fence == fence)
        found = Attempt.select(*ATTEMPT_VIEW_COLUMNS).where(where).first()
        if found is None:
            raise NotFound()
        return attempt_view(found)

    def comments(self, task_id: str, query: PageQuery, caller: Principal) -> Page[CommentView]:
        """Return the comments on a task, oldest first."""
        readable(task_id, caller)
        order = (Order(Comment.created_at, descending=False), Order(Comment.id, descending=False))
        return paginate(
            Comment.select().where(Comment.task_id == task_id),
            query,
            caller,
            scope=f"comments:{task_id}",
            order=order,
            make=lambda row: CommentView(
                id=row.id,
                author={"type": row.author_type, "id": row.author_id},
                body=row.body,
                created_at=row.created_at,
            ),
        )

    def events(self, task_id: str, query: PageQuery, caller: Principal) -> Page[EventView]:
        """Return the events of a task that the event log still contains, oldest first."""
        readable(task_id, caller)
        select = EventRow.select(EventRow.ins, *EVENT_COLUMNS).where(
            (EventRow.object_id == task_id) & EventRow.seq.is_null(False)
        )
        return paginate(
            select,
            query,
            caller,
            scope=f"events:{task_id}",
            order=(Order(EventRow.ins, descending=False),),
            make=lambda row: LoggedEvent(*[getattr(row, column.name) for column in EVENT_COLUMNS]).view(),
        )

    def artifacts(self, task_id: str, query: PageQuery, caller: Principal) -> Page[dict[str, Any]]:
        """Return the artifacts of a task, oldest first."""
        items: list[dict[str, Any]] = readable(task_id, caller).get("artifacts")
        start = query.offset if isinstance(query.offset, int) else 0
        if isinstance(query.cursor, str):
            (start,) = read_cursor(query.cursor, f"artifacts:{task_id}", caller, query.fingerprint())
        end = start + query.limit
        following = (
            write_cursor(f"artifacts:{task_id}", caller, query.fingerprint(), [end]) if end < len(items) else None
        )
        offset = None if isinstance(query.cursor, str) else start
        return Page(items=items[start:end], total=len(items), limit=query.limit, offset=offset, next=following)

    # -- statistics

    def stats(self, query: StatsQuery, caller: Principal) -> Stats:
        """Return statistics of all tasks, or of the tasks of one agent or since an instant."""
        if query == StatsQuery():
            counts, day, oldest, waits = (
                rollups.status_counts(),
                rollups.last_day(),
                rollups.oldest_pending_ms(),
                _WAITING.rows({}),
            )
        else:
            counts, day, oldest, waits = _counted(query)
        if not can_read(caller, SHARED, None):
            counts.clear()
        ended = day["completed"] + day["failed"]
        waiting = dict.fromkeys(("approval", "input", "review"), 0)
        waiting.update((kind, n) for kind, n in waits if kind in waiting)
        return Stats(
            total=sum(counts.values()),
            by_status={status: sum(n for key, n in counts.items() if key[0] == status) for status in STATUSES},
            by_priority={
                name: sum(n for key, n in counts.items() if key[1] == rank) for rank, name in enumerate(PRIORITIES)
            },
            oldest_pending_ms=oldest,
            success_rate_24h=day["completed"] / ended if ended else None,
            avg_duration_ms=round(day["duration_ms"] / day["completed"]) if day["completed"] else None,
            avg_queue_ms=round(day["queue_ms"] / day["queued"]) if day["queued"] else None,
            waiting_for=waiting,
        )


PLAIN = hashlib.sha256(b"{}").hexdigest()[:16]
_FREE = frozenset({"limit", "offset", "cursor"})


def _is_plain(query: TaskQuery, *, but: str = "sort") -> bool:
    """Return whether the query uses the default order and has no filter except `but`."""
    return query.sort == "created" and all(
        getattr(query, name) is UNSET for name in query.__struct_fields__ if name not in (*_FREE, "sort", but)
    )


def _is_counted(query: TaskQuery) -> bool:
    """Return whether counters provide the total, because the query filters only by status and priority."""
    known = {*_FREE, "sort", "status", "status_filter", "priority"}
    return all(getattr(query, name) is UNSET for name in query.__struct_fields__ if name not in known)


def _conditions(query: TaskQuery) -> tuple[list[Any], Any]:
    """Return the filters as SQL conditions, and as a predicate on the status and priority of a counter."""
    where: list[Any] = []
    statuses = [set(each) for each in (query.status_filter, query.status) if isinstance(each, list)]
    ranks = [PRIORITIES.index(name) for name in query.priority] if isinstance(query.priority, list) else None
    where += [_any(Task.status, sorted(each)) for each in statuses]
    if ranks is not None:
        where.append(_any(Task.priority, ranks))
    for name in ("agent_id", "worker_id", "parent_task_id", "workflow_run_id", "created_by"):
        value = getattr(query, name)
        if isinstance(value, str):
            where.append(getattr(Task, name) == value.lower())
    if isinstance(query.source_type, str):
        where.append(Task.source_type == query.source_type)
    if not isinstance(query.since, msgspec.UnsetType):
        where.append(Task.created_at >= clock.from_datetime(query.since))
    if not isinstance(query.until, msgspec.UnsetType):
        where.append(Task.created_at < clock.from_datetime(query.until))
    if isinstance(query.tag, list):
        tags = [peewee.fn.REPLACE(Task.tags, msgspec.json.encode(tag).decode(), "") != Task.tags for tag in query.tag]
        where.append(functools.reduce(operator.or_, tags))
    if isinstance(query.search, str):
        where.append(_has_words(search.words_of(query.search)))

    def counted(status: str, rank: int) -> bool:
        return all(status in each for each in statuses) and (ranks is None or rank in ranks)

    return where, counted


def _has_words(words: list[str]) -> Any:
    """Return the condition that a task is among the newest matches of a search. `search.CAP` limits their number."""
    if not words:
        return NO_ROWS
    found = Task.id.in_(search.candidates(search.query_of(words)))
    newer = [row[0] for row in search.newer(words)]
    return found | Task.id.in_(newer) if newer else found


def _any(field: Any, values: Sequence[Any]) -> Any:
    return field == values[0] if len(values) == 1 else field.in_(list(values))


def _counted(query: StatsQuery) -> tuple[Counter[tuple[str, int]], Counter[str], int | None, list[tuple[Any, ...]]]:
    """Compute for filtered tasks the statistics that counters provide for all tasks.

    Returns the counts by status and priority, the sums of the last day, the age of the oldest pending task in
    milliseconds, and the counts of waiting tasks by kind.
    """
    where: list[Any] = []
    if isinstance(query.agent_id, str):
        where.append(Task.agent_id == query.agent_id.lower())
    if not isinstance(query.since, msgspec.UnsetType):
        where.append(Task.created_at >= clock.from_datetime(query.since))
    n = peewee.fn.COUNT(Task.id)
    by = Task.select(Task.status, Task.priority, n).where(*where).group_by(Task.status, Task.priority)
    counts = Counter({(status, rank): count for status, rank, count in rows.values(by)})
    first = rows.values(Task.select(peewee.fn.MIN(Task.queued_at)).where(rows.PENDING, *where))[0][0]
    waits = Task.select(Task.waiting_kind, n).where(peewee.SQL("status = 'waiting'"), *where)
    oldest = None if first is None else clock.elapsed_ms(first, clock.now())
    return counts, _last_day(where), oldest, rows.values(waits.group_by(Task.waiting_kind))


def _last_day(where: list[Any]) -> Counter[str]:
    """Compute `rollups.last_day` for filtered tasks, from their last start and end."""
    began = rollups.day_began()
    done, failed = [(Task.status == status) & (Task.finished_at >= began) for status in ("completed", "failed")]
    started = (Task.started_at >= began) & (Task.queued_at <= Task.started_at)  # not queued again since
    ran, queued = [
        peewee.SQL(milliseconds_between(since, until))
        for since, until in (("started_at", "finished_at"), ("queued_at", "started_at"))
    ]
    sums = [
        peewee.fn.COALESCE(peewee.fn.SUM(peewee.Case(None, ((condition, value),), 0)), 0)
        for condition, value in ((done, 1), (failed, 1), (done, ran), (started, 1), (started, queued))
    ]
    found = rows.values(Task.select(*sums).where(*where))[0]
    return Counter({name: int(total) for name, total in zip(rollups.HOUR_FIELDS, found, strict=True)})


def readable(task_id: str, caller: Principal) -> TaskRow:
    """Return the task if the caller may read it, else raise `NotFound`. A worker may read the tasks that it holds."""
    row = rows.find(task_id)
    if row is None or not can_read(caller, SHARED, row.created_by):
        raise NotFound()
    if caller.kind == "worker" and not rows.is_held_by(row, caller.worker_id):
        raise NotFound()
    return row


def attempt_view(row: Any) -> AttemptView:
    """Return the API representation of an attempt."""
    return AttemptView(
        id=row.id,
        fence=row.fence,
        n=row.n,
        counted=row.counted,
        worker_id=row.worker_id,
        agent_id=row.agent_id,
        agent_version=row.agent_version,
        model=row.model,
        status=row.status,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
        usage={
            "input_tokens": row.input_tokens,
            "output_tokens": row.output_tokens,
            "calls": row.calls,
            "unpriced_tokens": row.unpriced_tokens,
        },
        cost_usd=row.cost_micro / 1e6,
        tainted=row.tainted,
        taint_sources=row.taint_sources or [],
    )
