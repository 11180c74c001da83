"""The words of titles and descriptions: a search costs the same whatever the size of the table.

`tasks_documents` numbers tasks in the order of the list, `tasks_search` has the words by that number (FTS5 on SQLite,
a GIN index on PostgreSQL). A schedule fills both as far as the settled past, where no commit can put another task; of
what is newer the newest `LOOKED` tasks are looked at one by one. A task is found when each word of the search begins
a word of its title or description, without regard to case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from corral import clock
from corral.database.unit import current
from corral_plugins.tasks.service.rows import TaskRow

CAP = 10_000
"""Only so many of the newest matches are known: to counts, far pages and other filters."""
LOOKED = 10_000
CHUNK = 250
SETTLED_SECONDS = 30
_WORD = re.compile(r"[^\W_]+")

_NUMBER_ALL = """INSERT INTO tasks_documents (created_at, task_id)
SELECT created_at, id FROM (
  SELECT created_at, id FROM tasks_tasks
  WHERE created_at >= ? AND (created_at > ? OR id > ?) AND created_at <= ? ORDER BY created_at, id LIMIT ? {share}
) AS q ORDER BY created_at, id ON CONFLICT DO NOTHING"""
_FILL = {
    "sqlite": """INSERT INTO tasks_search (rowid, title, description)
SELECT d.n, t.title, t.description FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id WHERE d.n > ?""",
    "postgres": """INSERT INTO tasks_search (n, words)
SELECT d.n, {words} FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id WHERE d.n > ?
ON CONFLICT DO NOTHING""",
}
_WORDS = "to_tsvector('simple', regexp_replace({text}, '[^[:alnum:]]+', ' ', 'g'))"
_MATCHES = {
    "sqlite": "SELECT rowid AS n FROM tasks_search WHERE tasks_search MATCH ? {older} ORDER BY rowid DESC LIMIT ?",
    "postgres": ("SELECT n FROM tasks_search WHERE words @@ to_tsquery('simple', ?) {older} ORDER BY n DESC LIMIT ?"),
}
_NEWER = """SELECT id, version, created_at, title, description FROM (
  SELECT id, version, created_at, title, description FROM tasks_tasks
  WHERE created_at >= ? AND (created_at > ? OR id > ?) ORDER BY created_at DESC, id DESC LIMIT ?
) AS q WHERE 1 = 1 {like}"""

Found = list[tuple[str, int, str]]
"""`(id, version, created_at)`, newest first."""


def words_of(text: str) -> list[str]:
    """The words of a text, lower-case; any text is a search, one without words finds nothing."""
    return [word.lower() for word in _WORD.findall(text)]


def _execute(sql: str, parameters: Sequence[Any]) -> Any:
    unit = current()
    return unit.connection.execute(sql if unit.database.kind == "sqlite" else sql.replace("?", "%s"), parameters)


def _is_sqlite() -> bool:
    return current().database.kind == "sqlite"


# -- reading


def query_of(words: Sequence[str]) -> str:
    """The words in the language of the engine.

    SQLite collects every place of a prefix before it gives the first, but reads those of a whole word as they are
    asked for. So a word that `CAP` tasks have is not taken as the beginning of others: there are enough already.
    """
    if _is_sqlite():
        whole = [f'"{word}"' for word in words]
        return " ".join(word if count(word) >= CAP else f"{word}*" for word in whole)
    return " & ".join(f"'{word}':*" for word in words)


def newer(words: Sequence[str]) -> Found:
    """Matches among what is not indexed yet."""
    plain = [word for word in words if word.isascii()]  # SQLite's `lower` knows no other letters
    like = " AND LOWER(title || ' ' || description) LIKE ?" * len(plain)
    last = _last()
    found = _execute(_NEWER.format(like=like), [last[0], last[0], last[1], LOOKED, *(f"%{word}%" for word in plain)])
    kept = [row[:3] for row in found.fetchall() if _fits(words, f"{row[3]} {row[4]}")]
    return sorted(kept, key=lambda row: (row[2], row[0]), reverse=True)


def _fits(words: Sequence[str], text: str) -> bool:
    have = words_of(text)
    return all(any(each.startswith(word) for each in have) for word in words)


def count(query: str) -> int:
    """Indexed matches, exact up to `CAP`."""
    inner = _MATCHES[_kind()].format(older="")
    found = _execute(f"SELECT COUNT(*) FROM ({inner}) AS q", [query, CAP]).fetchone()  # noqa: S608  (literals)
    return int(found[0])


def indexed(query: str, *, limit: int, offset: int = 0, before: tuple[str, str] | None = None) -> Found:
    """Indexed matches, newest first; `before`: older than this `(created_at, id)`."""
    column = "rowid" if _is_sqlite() else "n"
    inner = _MATCHES[_kind()].format(older="" if before is None else f"AND {column} <= ?")
    place = [] if before is None else [_place(before)]
    sql = f"""SELECT t.id, t.version, t.created_at FROM ({inner} OFFSET ?) AS q
JOIN tasks_documents d ON d.n = q.n JOIN tasks_tasks t ON t.id = d.task_id ORDER BY d.n DESC"""  # noqa: S608  (literals)
    return [tuple(row) for row in _execute(sql, [query, *place, limit, offset]).fetchall()]


def candidates(query: str) -> tuple[str, list[Any]]:
    """A subselect of the ids of the newest `CAP` indexed matches, and its parameters."""
    inner = _MATCHES[_kind()].format(older="")
    sql = f"(SELECT d.task_id FROM ({inner}) AS q JOIN tasks_documents d ON d.n = q.n)"  # noqa: S608  (literals)
    return sql if _is_sqlite() else sql.replace("?", "%s"), [query, CAP]


def _kind() -> str:
    return "sqlite" if _is_sqlite() else "postgres"


def _place(before: tuple[str, str]) -> int:
    """The number of the last task before this place; 0: there is none."""
    found = _execute(
        "SELECT n FROM tasks_documents WHERE created_at <= ? AND (created_at < ? OR task_id < ?)"
        " ORDER BY created_at DESC, task_id DESC LIMIT 1",
        [before[0], before[0], before[1]],
    ).fetchone()
    return 0 if found is None else int(found[0])


def _last() -> tuple[str, str]:
    """The newest indexed place."""
    found = _execute(
        "SELECT created_at, task_id FROM tasks_documents ORDER BY created_at DESC, task_id DESC LIMIT 1", []
    ).fetchone()
    return ("", "") if found is None else (found[0], found[1])


# -- writing


def extend() -> bool:
    """Index the next tasks of the settled past, one chunk; whether there may be more."""
    last, until = _last(), clock.now(-SETTLED_SECONDS)
    before = int(_execute("SELECT COALESCE(MAX(n), 0) FROM tasks_documents", []).fetchone()[0])
    # on PostgreSQL the rows are held, so that no change of a text falls between reading it and indexing it
    number_all = _NUMBER_ALL.format(share="" if _is_sqlite() else "FOR SHARE")
    made = _execute(number_all, [last[0], last[0], last[1], until, CHUNK]).rowcount
    if made > 0:
        words = _WORDS.format(text="t.title || ' ' || t.description")
        _execute(_FILL[_kind()].format(words=words), [before])
    return bool(made == CHUNK)


Known = tuple[int, str, str]


def known(row: TaskRow) -> Known | None:
    """Number and text of a task as they are indexed; to be read before the text changes."""
    found = _execute(
        "SELECT d.n, t.title, t.description FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id"
        " WHERE d.created_at = ? AND d.task_id = ?",
        [row.created_at, row.id],
    ).fetchone()
    return None if found is None else (int(found[0]), found[1], found[2])


def rewrite(old: Known | None, row: TaskRow) -> None:
    """The text of a locked task has changed; what was not indexed will be."""
    if old is None:
        return
    if _is_sqlite():
        _take_out(old)
        sql = "INSERT INTO tasks_search (rowid, title, description) SELECT ?, title, description"
        _execute(f"{sql} FROM tasks_tasks WHERE id = ?", [old[0], row.id])
    else:
        words = _WORDS.format(text="t.title || ' ' || t.description")
        sql = f"UPDATE tasks_search SET words = {words} FROM tasks_tasks t WHERE n = ? AND t.id = ?"  # noqa: S608  (literals)
        _execute(sql, [old[0], row.id])


def forget(row: TaskRow) -> None:
    """A task is about to be deleted: none of its words stays."""
    old = known(row)
    if old is not None:
        _take_out(old)
        _execute("DELETE FROM tasks_documents WHERE n = ?", [old[0]])


def _take_out(old: Known) -> None:
    if _is_sqlite():  # the index holds no texts: it is told what to take out
        sql = "INSERT INTO tasks_search (tasks_search, rowid, title, description) VALUES ('delete', ?, ?, ?)"
        _execute(sql, list(old))
    else:
        _execute("DELETE FROM tasks_search WHERE n = ?", [old[0]])
