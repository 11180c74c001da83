"""Full-text search in titles and descriptions, at a cost that does not depend on the size of the table.

`tasks_documents` numbers the tasks in list order, and the full-text index maps words to these numbers. A scheduled job
adds tasks to both once they are settled, which means that no commit can insert a task before them. The search reads up
to `UNINDEXED_LIMIT` newer tasks one by one. A task matches if each search word is a prefix of a word of its title or
description, ignoring case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import peewee

from corral import clock
from corral.database.dialect import execute, sql_fragment
from corral.database.full_text import FullTextIndex
from corral.database.unit import locked
from corral_plugins.tasks.models import SearchDocument, Task, TaskRow

CAP = 10_000
"""The maximum number of matches, newest first, that are counted, paged through or combined with other filters."""
UNINDEXED_LIMIT = 10_000
CHUNK = 250
SETTLED_SECONDS = 30
_WORD = re.compile(r"[^\W_]+")

INDEX = FullTextIndex("tasks_search", "title", "description")
_TEXTS = "SELECT d.n, t.title, t.description FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id"
_NEWER = """SELECT id, version, created_at, title, description FROM (
  SELECT id, version, created_at, title, description FROM tasks_tasks
  WHERE created_at >= ? AND (created_at > ? OR id > ?) ORDER BY created_at DESC, id DESC LIMIT ?
) AS q WHERE 1 = 1 {like}"""

Found = list[tuple[str, int, str]]
"""Matches as `(id, version, created_at)`, newest first."""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case. Any text is a valid search; a text without words matches nothing."""
    return [word.lower() for word in _WORD.findall(text)]


# -- reading


def query_of(words: Sequence[str]) -> str:
    """Return the full-text query for tasks that contain all these words."""
    return INDEX.query(words, enough=CAP)


def newer(words: Sequence[str]) -> Found:
    """Return the matches among the tasks that are not indexed yet."""
    plain = [word for word in words if word.isascii()]  # SQLite's `lower` converts ASCII letters only
    like = " AND LOWER(title || ' ' || description) LIKE ?" * len(plain)
    created_at, task_id = _last()
    parameters = [created_at, created_at, task_id, UNINDEXED_LIMIT, *(f"%{word}%" for word in plain)]
    found = execute(_NEWER.format(like=like), parameters).fetchall()
    matches = [row[:3] for row in found if _matches(words, f"{row[3]} {row[4]}")]
    return sorted(matches, key=lambda row: (row[2], row[0]), reverse=True)


def _matches(words: Sequence[str], text: str) -> bool:
    have = words_of(text)
    return all(any(each.startswith(word) for each in have) for word in words)


def count(query: str) -> int:
    """Return the number of indexed matches, exact up to `CAP`."""
    return INDEX.count(query, limit=CAP)


def indexed(query: str, *, limit: int, offset: int = 0, before: tuple[str, str] | None = None) -> Found:
    """Return indexed matches, newest first. `before` limits them to tasks older than this `(created_at, id)`."""
    matches = INDEX.matches(up_to=before is not None)
    highest = [] if before is None else [_number_before(before)]
    sql = f"""SELECT t.id, t.version, t.created_at FROM ({matches} OFFSET ?) AS q
JOIN tasks_documents d ON d.n = q.n JOIN tasks_tasks t ON t.id = d.task_id ORDER BY d.n DESC"""  # noqa: S608  (literals)
    return [tuple(row) for row in execute(sql, [query, *highest, limit, offset]).fetchall()]


def candidates(query: str) -> peewee.SQL:
    """Return a subselect of the ids of the newest `CAP` indexed matches."""
    sql = f"(SELECT d.task_id FROM ({INDEX.matches()}) AS q JOIN tasks_documents d ON d.n = q.n)"  # noqa: S608  (literals)
    return sql_fragment(sql, [query, CAP])


def _number_before(before: tuple[str, str]) -> int:
    """Return the number of the last indexed task before this key, or 0 if there is none."""
    found = execute(
        "SELECT n FROM tasks_documents WHERE created_at <= ? AND (created_at < ? OR task_id < ?)"
        " ORDER BY created_at DESC, task_id DESC LIMIT 1",
        [before[0], before[0], before[1]],
    ).fetchone()
    return 0 if found is None else int(found[0])


def _last() -> tuple[str, str]:
    """Return the sort key of the newest indexed task."""
    found = execute(
        "SELECT created_at, task_id FROM tasks_documents ORDER BY created_at DESC, task_id DESC LIMIT 1"
    ).fetchone()
    return ("", "") if found is None else (found[0], found[1])


# -- writing


def extend() -> bool:
    """Index the next batch of settled tasks. Return whether there may be more."""
    created_at, task_id = _last()
    after = (Task.created_at >= created_at) & ((Task.created_at > created_at) | (Task.id > task_id))
    before = int(execute("SELECT COALESCE(MAX(n), 0) FROM tasks_documents").fetchone()[0])
    query = (
        Task.select(Task.created_at, Task.id)
        .where(after & (Task.created_at <= clock.now(-SETTLED_SECONDS)))
        .order_by(Task.created_at, Task.id)
        .limit(CHUNK)
    )
    # Locked, so that the text cannot change between reading and indexing it.
    found = list(locked(query, share=True).tuples())
    if found:
        fields = [SearchDocument.created_at, SearchDocument.task_id]
        SearchDocument.insert_many(found, fields=fields).on_conflict_ignore().execute()
        INDEX.add(f"{_TEXTS} WHERE d.n > ?", [before])
    return len(found) == CHUNK


IndexedText = tuple[int, str, str]


def indexed_text(row: TaskRow) -> IndexedText | None:
    """Return the number and text of a task as they are indexed, or None. Call this function before the text changes."""
    found = execute(f"{_TEXTS} WHERE d.created_at = ? AND d.task_id = ?", [row.created_at, row.id]).fetchone()
    return None if found is None else (int(found[0]), found[1], found[2])


def reindex(old: IndexedText | None, row: TaskRow) -> None:
    """Index the changed text of a locked task. Does nothing for a task that is not indexed yet."""
    if old is not None:
        INDEX.remove(old[0], old[1:])
        INDEX.add("SELECT CAST(? AS BIGINT), title, description FROM tasks_tasks WHERE id = ?", [old[0], row.id])


def forget(row: TaskRow) -> None:
    """Remove a task from the index before it is deleted."""
    old = indexed_text(row)
    if old is not None:
        INDEX.remove(old[0], old[1:])
        SearchDocument.delete().where(SearchDocument.n == old[0]).execute()
