"""The reference of P11: one stock Quart handler a socket, each with a queue of its own, that sends JSON.

`python reference_sockets.py PORT` serves until it is terminated. `POST /emit?count=N` gives every socket N events.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart, request, websocket

app = Quart("sockets")
queues: set[asyncio.Queue[dict[str, Any]]] = set()
EVENT = {
    "type": "event",
    "event": "task.created",
    "seq": 1,
    "id": "0199e2c0-0000-7000-8000-000000000000",
    "ts": "2026-01-01T00:00:00.000Z",
    "data": {"task_id": "0199e2c0-0000-7000-8000-000000000000", "title": "x" * 60},
}


@app.websocket("/ws")
async def socket() -> None:
    """Send what comes into the queue."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    await websocket.accept()
    queues.add(queue)
    try:
        while True:
            await websocket.send_json(await queue.get())
    finally:
        queues.discard(queue)


@app.get("/hello")
async def hello() -> dict[str, str]:
    """Say hello."""
    return {"hello": "world"}


@app.post("/emit")
async def emit() -> dict[str, int]:
    """Give every socket so many events."""
    count = int(request.args["count"])
    for _ in range(count):
        for queue in queues:
            queue.put_nowait(EVENT)
    return {"emitted": count}


async def main(port: int) -> None:
    """Serve until SIGTERM."""
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = None
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await serve(app, config, shutdown_trigger=stopping.wait)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
