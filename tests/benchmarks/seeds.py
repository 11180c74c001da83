"""Data folders full of tasks. They are made by the product once (schema, keys, admin, one task as the pattern), then
filled straight into SQLite.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.servers import corral, sign_in

PATTERN = {
    "title": "Summarise the quarterly report",
    "description": "Read the attached figures and write one page for the board. " * 2,
    "instructions": "Be brief, name the sources, and say what you are not sure of. " * 2,
    "priority": "medium",
    "input": {"report": "2026-Q3", "pages": [1, 2, 3], "language": "en"},
    "tags": ["report", "finance"],
    "metadata": {"customer": "c-1042", "channel": "mail"},
    "timeout_seconds": 600,
}
PENDING_SHARE, PENDING_AT_LEAST = 0.05, 1000
STEP_MS = 500  # between two tasks
NEEDLES = 200  # so many tasks have the word that searches look for, whatever the size
CHUNK = 20_000


class Seeds:
    """`make(size)` gives a new folder with `size` tasks, 5 % of them (at least 1,000) pending, the others completed."""

    def __init__(self, folder: Path, *, forks: bool) -> None:
        self._folder, self._forks = folder, forks
        self._made = 0

    def make(self, size: int) -> Path:
        """A folder for `servers.corral`; without tasks when `size` is 0."""
        empty = self._folder / "empty"
        if not empty.exists():
            with corral(empty, forks=self._forks) as server:
                server.must("POST", "/api/v1/tasks", PATTERN, sign_in(server))
        self._made += 1
        target = Path(shutil.copytree(empty, self._folder / f"{self._made}-{size}"))
        if size:
            fill(target / "data" / "corral.db", size)
        return target


def fill(path: Path, size: int) -> None:
    """Add `size` tasks to a database that has one, from which they are copied. No server may have it open."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode=off; PRAGMA synchronous=off; PRAGMA cache_size=-400000;")
    cursor = connection.execute("SELECT * FROM tasks_tasks")
    columns = [item[0] for item in cursor.description]
    pattern = dict(zip(columns, cursor.fetchone(), strict=True))
    indexes = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'tasks_tasks' AND type = 'index' AND sql IS NOT NULL"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f'DROP INDEX "{name}"')
    counts: Counter[tuple[str, int]] = Counter()
    insert = f"INSERT INTO tasks_tasks ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    connection.execute("BEGIN")
    for chunk in _rows(pattern, size, counts):
        connection.executemany(insert, [[row[column] for column in columns] for row in chunk])
    for (status, priority), n in counts.items():
        connection.execute(
            "INSERT INTO tasks_counters (name, shard, n) VALUES (?, 0, ?) "
            "ON CONFLICT (name, shard) DO UPDATE SET n = n + excluded.n",
            (f"status:{status}:{priority}", n),
        )
    pending = sum(n for (status, _), n in counts.items() if status == "pending")
    connection.execute("UPDATE tasks_counters SET n = n + ? WHERE name = ?", (pending, f"open:{pattern['created_by']}"))
    connection.execute("COMMIT")
    for _, statement in indexes:
        connection.execute(statement)
    _index(connection)
    connection.execute("PRAGMA journal_mode=wal")
    connection.close()


def _index(connection: sqlite3.Connection) -> None:
    """Have the lists by tag and the search know all tasks, as they do soon after the tasks were created one by one.

    The segments of the search index are merged, as they are after some minutes without new tasks.
    """
    connection.execute("BEGIN")
    connection.execute(
        "INSERT INTO tasks_documents (created_at, task_id) SELECT created_at, id FROM tasks_tasks "
        "WHERE id NOT IN (SELECT task_id FROM tasks_documents) ORDER BY created_at, id"
    )
    connection.execute(
        "INSERT INTO tasks_search (rowid, title, description) SELECT d.n, t.title, t.description "
        "FROM tasks_documents d JOIN tasks_tasks t ON t.id = d.task_id"
    )
    connection.execute(
        "INSERT OR IGNORE INTO tasks_tags (tag, created_at, task_id) "
        "SELECT each.value, t.created_at, t.id FROM tasks_tasks t, json_each(t.tags) each"
    )
    connection.execute("COMMIT")
    before = -2
    while connection.total_changes - before >= 2:  # the last merge finds nothing to do
        before = connection.total_changes
        connection.execute("INSERT INTO tasks_search (tasks_search, rank) VALUES ('merge', 1000)")


def _rows(pattern: dict[str, Any], size: int, counts: Counter[tuple[str, int]]) -> Iterator[list[dict[str, Any]]]:
    """The oldest first, in chunks; the pending ones are spread evenly."""
    needle_every = max(1, size // NEEDLES)
    pending_every = max(1, round(1 / max(PENDING_SHARE, PENDING_AT_LEAST / size)))
    first_ms = int(time.time() * 1000) - (size + 1) * STEP_MS
    chunk: list[dict[str, Any]] = []
    for number in range(size):
        ms = first_ms + number * STEP_MS
        at = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        priority = number * 7 % 4
        word = "needle" if number % needle_every == 0 else "report"
        row = {
            **pattern,
            "id": f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{number >> 20:03x}-8000-{number:012x}",
            "title": f"Summarise {word} {number}",
            "priority": priority,
            "rank": priority,
            "created_at": at,
            "updated_at": at,
            "queued_at": at,
            "available_at": at,
        }
        if number % pending_every:
            row.update(
                status="completed",
                queue=None,
                finished_at=at,
                started_at=at,
                version=4,
                attempt=1,
                fence=1,
            )
        counts[(row["status"], priority)] += 1
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk


def task_ids(folder: Path, limit: int = 1000) -> list[str]:
    """Ids spread over the whole table."""
    connection = sqlite3.connect(f"file:{folder / 'data' / 'corral.db'}?mode=ro", uri=True)
    total = connection.execute("SELECT count(*) FROM tasks_tasks").fetchone()[0]
    step = max(1, total // limit)
    found = [
        row[0] for row in connection.execute("SELECT id FROM tasks_tasks WHERE rowid % ? = 0 LIMIT ?", (step, limit))
    ]
    connection.close()
    return found
