"""What P3 would be without the product: the statements of one new task, in its own tables, answered by plain ASGI.

`python reference_write.py PORT DATABASE` serves until it is terminated, on stock Hypercorn. `DATABASE` is a file of the
product with a pending task, which every POST repeats: the task, and once for all that are committed together the tags,
counters and events, by one writer thread, with `synchronous=FULL`. Nothing is checked, parsed or encoded.
"""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import sqlite3
import sys
import threading
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from corral.ids import new_id

BODY = b'"%s"' % (b"x" * 1900)  # as long as the product's answer
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
PRAGMAS = "PRAGMA journal_mode=wal; PRAGMA synchronous=full; PRAGMA foreign_keys=1; PRAGMA cache_size=-4000; "
PRAGMAS += "PRAGMA temp_store=memory; PRAGMA wal_autocheckpoint=4000"
COUNT = """INSERT INTO tasks_counters (name, shard, n) VALUES (?, 0, ?), (?, 0, ?)
ON CONFLICT (name, shard) DO UPDATE SET n = n + excluded.n"""
LAST = "SELECT COALESCE(MAX(seq), 0) FROM kernel_events"

Batch = list[asyncio.Future[None]]


class Writer(threading.Thread):
    """Commits batches; each future is resolved on the loop afterwards."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self._waiting: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._arrived: Batch = []
        self._last_batch = 0
        self._loop = loop
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
        self._connection.executescript(PRAGMAS)
        self._task = self._pattern("SELECT * FROM tasks_tasks WHERE status = 'pending' LIMIT 1")
        self._event = self._pattern("SELECT * FROM kernel_events WHERE type = 'task.created' LIMIT 1")
        del self._event["ins"]
        self._tags = sorted({*json.loads(self._task["tags"])})
        self._insert_task = self._insert("tasks_tasks", self._task)
        self._insert_event = self._insert("kernel_events", self._event)

    def _pattern(self, select: str) -> dict[str, Any]:
        cursor = self._connection.execute(select)
        row = zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True)
        return {name: value for name, value in row if value is not None}

    @staticmethod
    def _insert(table: str, row: dict[str, Any]) -> str:
        return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"

    def submit(self, written: asyncio.Future[None]) -> None:
        """Write a task together with others, as many as in the last batch or as keep arriving, as the product does."""
        self._arrived.append(written)
        if len(self._arrived) == 1:
            self._queue_arrived(0)

    def _queue_arrived(self, seen: int) -> None:
        if seen < len(self._arrived) < self._last_batch:
            self._loop.call_soon(self._queue_arrived, len(self._arrived))
        else:
            self._waiting.put(self._arrived)
            self._arrived = []

    def run(self) -> None:
        while True:
            batch = self._waiting.get()
            while not self._waiting.empty():
                batch += self._waiting.get()
            self._last_batch = len(batch)
            self._write(len(batch))
            self._loop.call_soon_threadsafe(_resolve, batch)

    def _write(self, number: int) -> None:
        execute, executemany, task = self._connection.execute, self._connection.executemany, self._task
        execute("BEGIN IMMEDIATE")
        ids = [new_id() for _ in range(number)]
        for task["id"] in ids:
            execute(self._insert_task, list(task.values()))
        tags = [(tag, task["created_at"], each) for each in ids for tag in self._tags]
        executemany("INSERT INTO tasks_tags VALUES (?, ?, ?)", tags)
        execute(COUNT, (f"open:{task['created_by']}", number, f"status:{task['status']}:{task['priority']}", number))
        last: int = execute(LAST).fetchone()[0]
        events = [{**self._event, "id": new_id(), "object_id": each, "seq": n} for n, each in enumerate(ids, last + 1)]
        executemany(self._insert_event, [list(event.values()) for event in events])
        execute("COMMIT")


def _resolve(batch: Batch) -> None:
    for future in batch:
        future.set_result(None)


async def main(port: int, path: str) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    writer = Writer(path, loop)
    writer.start()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        is_post = scope["method"] == "POST"
        if is_post:
            while (await receive()).get("more_body"):
                continue
            written: asyncio.Future[None] = loop.create_future()
            writer.submit(written)
            await written
        await send({"type": "http.response.start", "status": 201 if is_post else 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": BODY})

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = None
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    await serve(app, config, shutdown_trigger=stopping.wait)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
