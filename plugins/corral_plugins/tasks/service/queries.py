"""Reads tasks for clients: the paginated list, the search, and the details of one task.

Frequent queries are answered from indexes and counters, so that their cost does not depend on the size of the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import peewee

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import NO_ROWS, can_read, visible
from corral.database.dialect import execute, sql_fragment
from corral.database.full_text import FullTextIndex
from corral.database.model import SHARED
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import NotFound
from corral.events.log import COLUMNS as EVENT_COLUMNS
from corral.events.log import EventRow, EventView, LoggedEvent
from corral.http.page import Order, Page, PageQuery, paginate, read_cursor, refuse_cursor_with_offset, write_cursor
from corral_plugins.tasks.models import (
    Attempt,
    Comment,
    PageAnchor,
    SearchDocument,
    Task,
    TaskRow,
)
from corral_plugins.tasks.service import statistics
from corral_plugins.tasks.service.filters import PLAIN, conditions, counted_total, is_unfiltered
from corral_plugins.tasks.service.rows import TaskViews, find_readable_task
from corral_plugins.tasks.service.task_stats import read_stats, task_stats
from corral_plugins.tasks.shapes import AttemptView, CommentView, TaskQuery, TaskStats, TaskStatsQuery

MAX_MATCHES = 10_000
"""The maximum number of matches that a search considers. If there are more, only the newest are considered."""
UNINDEXED_LIMIT = 10_000
INDEX_CHUNK = 250
SETTLED_SECONDS = 30
_WORD = re.compile(r"[^\W_]+")

INDEX = FullTextIndex("tasks_search", "title", "description")
_TEXTS = "SELECT d.n, t.title, t.description FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id"
_NEWER = """SELECT id, version, created_at, title, description FROM (
  SELECT id, version, created_at, title, description FROM tasks_tasks
  WHERE created_at >= ? AND (created_at > ? OR id > ?) ORDER BY created_at DESC, id DESC LIMIT ?
) AS q WHERE 1 = 1 {like}"""

Matches = list[tuple[str, int, str]]
"""The tasks that match a search, each as `(id, version, created_at)`, newest first."""


def search_words(text: str) -> list[str]:
    """Return the words of a string, converted to lower case.

    Any string is valid; a string without words matches no tasks.
    """
    return [word.lower() for word in _WORD.findall(text)]


# -- reading


def search_query(words: Sequence[str]) -> str:
    """Return the full-text query for tasks that contain all of the words."""
    return INDEX.query(words, enough=MAX_MATCHES)


def unindexed_matches(words: Sequence[str]) -> Matches:
    """Return the tasks that match the search but are not indexed yet."""
    plain = [word for word in words if word.isascii()]  # SQLite's `lower` converts ASCII letters only
    like = " AND LOWER(title || ' ' || description) LIKE ?" * len(plain)
    created_at, task_id = _last_indexed()
    parameters = [created_at, created_at, task_id, UNINDEXED_LIMIT, *(f"%{word}%" for word in plain)]
    found = execute(_NEWER.format(like=like), parameters).fetchall()
    matches = [row[:3] for row in found if _matches_words(words, f"{row[3]} {row[4]}")]
    return sorted(matches, key=lambda row: (row[2], row[0]), reverse=True)


def _matches_words(words: Sequence[str], text: str) -> bool:
    have = search_words(text)
    return all(any(each.startswith(word) for each in have) for word in words)


def count_matches(query: str) -> int:
    """Return the number of indexed tasks that match the search. The number is exact up to `MAX_MATCHES`."""
    return INDEX.count(query, limit=MAX_MATCHES)


def indexed_matches(query: str, *, limit: int, offset: int = 0, before: tuple[str, str] | None = None) -> Matches:
    """Return the indexed tasks that match the search, newest first.

    If `before` is given, only tasks older than this `(created_at, id)` are returned.
    """
    matches = INDEX.match_sql(up_to=before is not None)
    highest = [] if before is None else [_index_number_before(before)]
    sql = f"""SELECT t.id, t.version, t.created_at FROM ({matches} OFFSET ?) AS q
JOIN tasks_documents d ON d.n = q.n JOIN tasks_tasks t ON t.id = d.task_id ORDER BY d.n DESC"""  # noqa: S608  (literals)
    return [tuple(row) for row in execute(sql, [query, *highest, limit, offset]).fetchall()]


def matches_subselect(query: str) -> peewee.SQL:
    """Return a subquery for the ids of the newest `MAX_MATCHES` indexed tasks that match the search."""
    sql = f"(SELECT d.task_id FROM ({INDEX.match_sql()}) AS q JOIN tasks_documents d ON d.n = q.n)"  # noqa: S608  (literals)
    return sql_fragment(sql, [query, MAX_MATCHES])


def _index_number_before(before: tuple[str, str]) -> int:
    """Return the index key (`SearchDocument.n`) of the newest indexed task that is older than the sort key `before`.

    Return 0 if there is no such task.
    """
    found = execute(
        "SELECT n FROM tasks_documents WHERE created_at <= ? AND (created_at < ? OR task_id < ?)"
        " ORDER BY created_at DESC, task_id DESC LIMIT 1",
        [before[0], before[0], before[1]],
    ).fetchone()
    return 0 if found is None else int(found[0])


def _last_indexed() -> tuple[str, str]:
    """Return the sort key `(created_at, id)` of the newest indexed task, or empty strings if no task is indexed."""
    found = execute(
        "SELECT created_at, task_id FROM tasks_documents ORDER BY created_at DESC, task_id DESC LIMIT 1"
    ).fetchone()
    return ("", "") if found is None else (found[0], found[1])


# -- writing


def index_next_tasks() -> bool:
    """Add the next batch of tasks that were created more than 30 s ago to the search index.

    Return whether there may be more tasks to index. If there are none, also merge segments of the index.
    """
    created_at, task_id = _last_indexed()
    after = (Task.created_at >= created_at) & ((Task.created_at > created_at) | (Task.id > task_id))
    before = int(execute("SELECT COALESCE(MAX(n), 0) FROM tasks_documents").fetchone()[0])
    query = (
        Task.select(Task.created_at, Task.id)
        .where(after & (Task.created_at <= clock.now(-SETTLED_SECONDS)))
        .order_by(Task.created_at, Task.id)
        .limit(INDEX_CHUNK)
    )
    # Locked, so that the text cannot change between reading and indexing it.
    found = list(locked(query, share=True).tuples())
    if found:
        fields = [SearchDocument.created_at, SearchDocument.task_id]
        SearchDocument.insert_many(found, fields=fields).on_conflict_ignore().execute()
        INDEX.add(f"{_TEXTS} WHERE d.n > ?", [before])
    if len(found) == INDEX_CHUNK:
        return True
    INDEX.merge()
    return False


def rebuild_search_index() -> None:
    """Build the search index for all tasks. The full-text index must be empty when this function is called."""
    SearchDocument.delete().execute()
    while index_next_tasks():
        pass


IndexedText = tuple[int, str, str]


def indexed_text(row: TaskRow) -> IndexedText | None:
    """Return the index key and the indexed text of a task, or None if the task is not in the search index.

    Call this function before you change the text, because `reindex` needs the old text.
    """
    found = execute(f"{_TEXTS} WHERE d.created_at = ? AND d.task_id = ?", [row.created_at, row.id]).fetchone()
    return None if found is None else (int(found[0]), found[1], found[2])


def reindex(old: IndexedText | None, row: TaskRow) -> None:
    """Index the changed text of a locked task. The function does nothing if the task is not indexed yet."""
    if old is not None:
        INDEX.remove(old[0], old[1:])
        INDEX.add("SELECT CAST(? AS BIGINT), title, description FROM tasks_tasks WHERE id = ?", [old[0], row.id])


def remove_from_index(row: TaskRow) -> None:
    """Remove a task from the index before it is deleted."""
    old = indexed_text(row)
    if old is not None:
        INDEX.remove(old[0], old[1:])
        SearchDocument.delete().where(SearchDocument.n == old[0]).execute()


# -- pages


ANCHOR_INTERVAL = 5000
SETTLED_AFTER = 60
BEFORE_ALL = ("", "")

_ANCHORS = Statement(
    lambda p: (
        PageAnchor.select(PageAnchor.created_at, PageAnchor.task_id, PageAnchor.n)
        .order_by(PageAnchor.created_at, PageAnchor.task_id)
        .tuples()
    )
)
_LAST_ANCHOR = Statement(
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
        .where(_is_after(p("created_at"), p("id")))
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


def _is_after(created_at: Any, task_id: Any) -> Any:
    return (Task.created_at >= created_at) & (
        (Task.created_at > created_at) | ((Task.created_at == created_at) & (Task.id > task_id))
    )


def key_at_position(position: int) -> tuple[str, str] | None:
    """Return the sort key of the task that has exactly `position` older tasks, or None if there is no such task."""
    start, left = BEFORE_ALL, position
    for created_at, task_id, n in _ANCHORS.rows({}):
        if n > left:
            break
        start, left = (created_at, task_id), left - n
    found = _NTH_AFTER.one({"created_at": start[0], "id": start[1], "offset": left})
    return None if found is None else (found[0], found[1])


def extend_anchors() -> bool:
    """Write the next page anchor if enough settled tasks follow the last anchor. Return whether an anchor was written.

    A page anchor saves a position in the list of all tasks, so that pages at large offsets are found quickly. A task
    that was created more than 60 s ago is settled: no pending commit can still add an older task.
    """
    found = next_anchor()
    if found is not None:
        _INSERT.run({"created_at": found[0], "id": found[1]})
    return found is not None


def next_anchor() -> tuple[str, str] | None:
    """Return the position of the next page anchor to write, or None if too few settled tasks follow the last anchor."""
    last = _LAST_ANCHOR.one({}) or BEFORE_ALL
    found = _NTH_AFTER.one({"created_at": last[0], "id": last[1], "offset": ANCHOR_INTERVAL - 1})
    return None if found is None or found[0] > clock.now(-SETTLED_AFTER) else (found[0], found[1])


def decrement_anchor(created_at: str, task_id: str) -> None:
    """Decrement the task count of the page anchor that covers the position of a deleted task."""
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
NEAR_OFFSET = 2000


ATTEMPT_VIEW_COLUMNS = [
    column
    for column in Attempt._meta.sorted_fields
    if column.name not in ("checkpoint", "output_schema", "token_hash", "lease_id")
]


class TaskQueries:
    """Reads tasks for clients. Every method runs in the caller's unit of work."""

    def __init__(self, views: TaskViews) -> None:
        self._views = views

    def list_tasks(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        """Return a page of the task list."""
        refuse_cursor_with_offset(query)
        if query.__class__ is TaskQuery and is_unfiltered(query):
            return self._unfiltered_page(query, caller)
        if isinstance(query.search, str) and is_unfiltered(query, but="search") and can_read(caller, SHARED, None):
            return self._search_page(query, search_words(query.search), caller)
        return self._filtered_page(query, caller)

    # -- the plain list

    def _unfiltered_page(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        total = statistics.count_all_tasks()
        if not can_read(caller, SHARED, None):
            return Page(items=[], total=0, limit=query.limit, offset=query.offset or 0, next=None)
        offset: int | None = None
        if isinstance(query.cursor, str):
            created_at, task_id = read_cursor(query.cursor, SCOPE, caller, PLAIN)
            found = _OLDER.rows({"created_at": created_at, "id": task_id, "limit": query.limit + 1})
        else:
            offset = query.offset if isinstance(query.offset, int) else 0
            found = self._rows_from_offset(offset, query.limit + 1, total)
        following = None
        if len(found) > query.limit:
            found.pop()
            following = write_cursor(SCOPE, caller, PLAIN, [found[-1][2], found[-1][0]])
        items = self._views.encoded_items((row[0], row[1]) for row in found)
        return Page(items=items, total=total, limit=query.limit, offset=offset, next=following)

    @staticmethod
    def _rows_from_offset(offset: int, limit: int, total: int) -> list[tuple[Any, ...]]:
        """Return at most `limit` rows, starting at `offset`.

        Page anchors make large offsets fast. Their positions are counted from the oldest task.
        """
        if offset == 0:
            return _NEWEST.rows({"limit": limit})
        if offset <= NEAR_OFFSET:
            place = _PLACE.one({"offset": offset - 1})
        else:
            place = key_at_position(total - offset) if offset <= total else None
        return [] if place is None else _OLDER.rows({"created_at": place[0], "id": place[1], "limit": limit})

    # -- by words alone

    def _search_page(self, query: TaskQuery, words: list[str], caller: Principal) -> Page[Any]:
        """Return a page of the search results.

        Tasks that are not indexed yet come first, because they are newer than all indexed tasks.
        """
        if not words:
            return Page(items=[], total=0, limit=query.limit, offset=query.offset or 0, next=None)
        scope, fingerprint = f"{SCOPE}.search", query.fingerprint()
        unindexed, known, limit = unindexed_matches(words), search_query(words), query.limit + 1
        total = min(len(unindexed) + count_matches(known), MAX_MATCHES)
        offset: int | None = None
        if isinstance(query.cursor, str):
            created_at, task_id = read_cursor(query.cursor, scope, caller, fingerprint)
            found = [row for row in unindexed if (row[2], row[0]) < (created_at, task_id)][:limit]
            found += indexed_matches(known, limit=limit - len(found), before=(created_at, task_id))
        else:
            offset = query.offset if isinstance(query.offset, int) else 0
            found = unindexed[offset : offset + limit]
            skipped = max(0, offset - len(unindexed))
            if skipped < MAX_MATCHES:
                found += indexed_matches(known, limit=limit - len(found), offset=skipped)
        following = None
        if len(found) > query.limit:
            found.pop()
            following = write_cursor(scope, caller, fingerprint, [found[-1][2], found[-1][0]])
        items = self._views.encoded_items((row[0], row[1]) for row in found)
        return Page(items=items, total=total, limit=query.limit, offset=offset, next=following)

    # -- with filters

    def _filtered_page(self, query: TaskQuery, caller: Principal) -> Page[Any]:
        allowed, search = visible(Task, caller), []
        if isinstance(query.search, str):
            search = [_matches_search(search_words(query.search))]
        total = 0 if allowed is NO_ROWS else counted_total(query)
        if total is None:
            total = Task.select(Task.id).where(allowed, *conditions(query), *search).count()
        columns = (Task.id, Task.version, Task.created_at, Task.updated_at, Task.priority)
        select = Task.select(*columns).where(allowed, *conditions(query, matches=total), *search).namedtuples()
        order = {
            "created": (Order(Task.created_at), Order(Task.id)),
            "updated": (Order(Task.updated_at), Order(Task.id)),
            "priority": (Order(Task.priority), Order(Task.created_at), Order(Task.id)),
        }[query.sort]
        page = paginate(
            select, query, caller, scope=SCOPE, order=order, make=lambda row: (row.id, row.version), total=total
        )
        return Page(
            items=self._views.encoded_items(page.items),
            total=page.total,
            limit=page.limit,
            offset=page.offset,
            next=page.next,
        )

    # -- one task; `NotFound` when the caller cannot see it

    def attempts(self, task_id: str, query: PageQuery, caller: Principal) -> Page[AttemptView]:
        """Return the attempts of a task, oldest first."""
        find_readable_task(task_id, caller)
        select = Attempt.select(*ATTEMPT_VIEW_COLUMNS).where(Attempt.task_id == task_id)
        order = (Order(Attempt.fence, descending=False),)
        return paginate(select, query, caller, scope=f"attempts:{task_id}", order=order, make=attempt_view)

    def attempt(self, task_id: str, fence: int, caller: Principal) -> AttemptView:
        """Return one attempt of a task.

        Raise `NotFound` if the task or the attempt does not exist, or if the caller may not read the task.
        """
        find_readable_task(task_id, caller)
        where = (Attempt.task_id == task_id) & (Attempt.fence == fence)
        found = Attempt.select(*ATTEMPT_VIEW_COLUMNS).where(where).first()
        if found is None:
            raise NotFound("The task has no attempt with this number.")
        return attempt_view(found)

    def comments(self, task_id: str, query: PageQuery, caller: Principal) -> Page[CommentView]:
        """Return the comments on a task, oldest first."""
        find_readable_task(task_id, caller)
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
        find_readable_task(task_id, caller)
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
        items: list[dict[str, Any]] = find_readable_task(task_id, caller).get("artifacts")
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

    def stats(self, query: TaskStatsQuery, caller: Principal) -> TaskStats:
        """Return task statistics.

        The query can limit the statistics to the tasks of one agent, or to tasks created since a given time.
        """
        return read_stats(query) if can_read(caller, SHARED, None) else task_stats(Counter(), Counter(), {})


def _matches_search(words: list[str]) -> Any:
    """Return the SQL condition that selects the unindexed matches and the newest `MAX_MATCHES` indexed matches."""
    if not words:
        return NO_ROWS
    found = Task.id.in_(matches_subselect(search_query(words)))
    unindexed = [row[0] for row in unindexed_matches(words)]
    return found | Task.id.in_(unindexed) if unindexed else found


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
        result=row.result,
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
