"""The load: keep-alive HTTP/1.1 over raw sockets, cheap enough to keep one server core busy. A process of its own.

Reads a job as JSON on standard input, prints the result as JSON:
`{"port", "requests": [base64…], "connections": 32, "seconds": 2.0 | "count": 500, "accept": [200]}` ->
`{"count", "seconds", "per_second", "least_ms", "p50_ms", "p99_ms", "max_ms", "unexpected", "sample"}`.
Requests are sent in turn. What was not accepted, or not answered, is `unexpected` and in none of the other figures;
`sample` is the first of it.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any


class Tally:
    """What all connections share: the requests still to send, and how those sent went."""

    def __init__(self, job: dict[str, Any]) -> None:
        requests = [base64.b64decode(item) for item in job["requests"]]
        self._requests: Iterator[bytes] = islice(cycle(requests), job.get("count"))
        self._until = time.perf_counter() + job.get("seconds", 600.0)
        self._accept = tuple(b" %d " % status for status in job["accept"])
        self.latencies: list[float] = []
        self.finished = False
        self.unexpected = 0
        self.sample = ""

    def next(self, now: float) -> bytes | None:
        """The next request; None when the work is done."""
        request = next(self._requests, None) if now < self._until else None
        self.finished = request is None
        return request

    def answered(self, seconds: float, answer: bytes) -> None:
        """Count an answer (or its beginning)."""
        if answer.startswith(self._accept, 8):
            self.latencies.append(seconds)
        else:
            self.failed(answer[:2000].decode("latin1"))

    def failed(self, what: str) -> None:
        """Count something that should not have come."""
        self.unexpected += 1
        self.sample = self.sample or what


class Connection(asyncio.Protocol):
    """One request at a time. `ended` is resolved when the connection is over, by either side."""

    def __init__(self, tally: Tally, ended: asyncio.Future[None]) -> None:
        self.tally, self.ended = tally, ended
        self.buffer = b""
        self.needs = 0  # bytes of the whole answer, once its head is there
        self.last = False
        self.sent: float | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.next()

    def next(self) -> None:
        """Send the next request, or end."""
        now = time.perf_counter()
        request = None if self.last else self.tally.next(now)
        if request is None:
            self.transport.close()
        else:
            self.sent = now
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer + data if self.buffer else data
        if not self.needs:
            end = buffer.find(b"\r\n\r\n")
            if end >= 0:
                head = buffer[: end + 2].lower()
                self.needs = end + 4 + _length(head)
                self.last = b"\r\nconnection: close\r\n" in head
        if not self.needs or len(buffer) < self.needs:
            self.buffer = buffer
            return
        assert self.sent is not None
        self.tally.answered(time.perf_counter() - self.sent, buffer)
        self.buffer, self.needs, self.sent = b"", 0, None
        self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.sent is not None:
            self.tally.failed(f"the connection was lost before an answer: {exc}")
        if not self.ended.done():
            self.ended.set_result(None)


def _length(head: bytes) -> int:
    at = head.find(b"\r\ncontent-length:")
    return int(head[at + 17 : head.find(b"\r", at + 17)]) if at >= 0 else 0


async def _client(port: int, tally: Tally) -> None:
    """One connection after the other: servers close them after some number of requests."""
    loop = asyncio.get_running_loop()
    while not tally.finished:
        ended: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda ended=ended: Connection(tally, ended), "127.0.0.1", port)  # type: ignore[misc]  # bound
        await ended


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job."""
    tally = Tally(job)
    began = time.perf_counter()
    await asyncio.gather(*[_client(job["port"], tally) for _ in range(job["connections"])])
    took = time.perf_counter() - began
    ordered = sorted(tally.latencies) or [0.0]
    return {
        "count": len(tally.latencies),
        "seconds": took,
        "per_second": len(tally.latencies) / took,
        "least_ms": ordered[0] * 1000,
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000,
        "max_ms": ordered[-1] * 1000,
        "unexpected": tally.unexpected,
        "sample": tally.sample,
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    gc.disable()
    print(json.dumps(asyncio.run(run(given))))
