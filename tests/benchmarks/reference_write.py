"""What P3 would be without the product: the statements of one new task, in its own tables, answered by plain ASGI.

`python reference_write.py PORT DATABASE` serves until it is terminated, on stock Hypercorn. `DATABASE` is a file of the
product with a pending task, which every POST repeats: the task, its tags, counters and event in a savepoint, by one
writer thread that commits what waits together, with `synchronous=FULL`. Nothing is checked, parsed or encoded.
"""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import sqlite3
import sys
import threading
import time
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from corral.ids import new_id

BATCH_UNITS, GATHER_SECONDS = 64, 0.0003
BODY = b'"%s"' % (b"x" * 1900)  # as long as the product's answer
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
PRAGMAS = "PRAGMA journal_mode=wal; PRAGMA synchronous=full; PRAGMA foreign_keys=1; PRAGMA cache_size=-4000; "
PRAGMAS += "PRAGMA temp_store=memory"  # for the copies of pages that each savepoint keeps
COUNT = """INSERT INTO tasks_counters (name, shard, n) VALUES (?, 0, 1), (?, 0, 1)
ON CONFLICT (name, shard) DO UPDATE SET n = n + excluded.n"""
NEXT = "(SELECT COALESCE(MAX(seq), 0) + 1 FROM kernel_events)"


class Writer(threading.Thread):
    """Commits what is waiting; each future is resolved on the loop afterwards."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self.waiting: queue.SimpleQueue[asyncio.Future[None]] = queue.SimpleQueue()
        self._loop = loop
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
        self._connection.executescript(PRAGMAS)
        self._task = self._pattern("SELECT * FROM tasks_tasks WHERE status = 'pending' LIMIT 1")
        self._event = self._pattern("SELECT * FROM kernel_events WHERE type = 'task.created' LIMIT 1")
        del self._event["ins"]
        self._event.pop("seq", None)
        self._tags = sorted({*json.loads(self._task["tags"])})
        self._insert_task = self._insert("tasks_tasks", self._task)
        self._insert_tags = f"INSERT INTO tasks_tags VALUES {', '.join(['(?, ?, ?)'] * len(self._tags))}"
        self._insert_event = self._insert("kernel_events", self._event, seq=NEXT)

    def _pattern(self, select: str) -> dict[str, Any]:
        cursor = self._connection.execute(select)
        row = zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True)
        return {name: value for name, value in row if value is not None}

    @staticmethod
    def _insert(table: str, row: dict[str, Any], **computed: str) -> str:
        names, values = [*computed, *row], [*computed.values(), *"?" * len(row)]
        return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(values)})"

    def run(self) -> None:
        before = 0
        while True:
            batch = [self.waiting.get()]
            self._gather(before)
            self._connection.execute("BEGIN IMMEDIATE")
            self._unit()
            while len(batch) < BATCH_UNITS and not self.waiting.empty():
                batch.append(self.waiting.get())
                self._unit()
            self._connection.execute("COMMIT")
            before = len(batch)
            self._loop.call_soon_threadsafe(_resolve, batch)

    def _gather(self, before: int) -> None:
        """Wait as the product does: while units arrive, until there are as many as in the batch before."""
        seen, waiting = -1, self.waiting.qsize()
        while seen < waiting < before - 1:
            time.sleep(GATHER_SECONDS)
            seen, waiting = waiting, self.waiting.qsize()

    def _unit(self) -> None:
        execute, task, event = self._connection.execute, self._task, self._event
        task["id"] = event["object_id"] = new_id()
        event["id"] = new_id()
        execute("SAVEPOINT unit")
        execute(self._insert_task, list(task.values()))
        if self._tags:
            execute(self._insert_tags, [part for tag in self._tags for part in (tag, task["created_at"], task["id"])])
        execute(COUNT, (f"open:{task['created_by']}", f"status:{task['status']}:{task['priority']}"))
        execute(self._insert_event, list(event.values()))
        execute("RELEASE unit")


def _resolve(batch: list[asyncio.Future[None]]) -> None:
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
            writer.waiting.put(written)
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
