"""Many WebSocket clients in one process, over raw sockets, and the requests that make events for them.

Reads a job as JSON on standard input, prints the result as JSON:
`{"port", "paths": [path…], "say": text | null, "emit": base64 request, "events": events a request, "burst": requests,
"bursts": rounds, "single": rounds}` -> `{"clients", "per_second", "rates", "last_ms"}`: frames a second, the median of
the bursts and each of them; the median of how long after the request the last client had its event. Each client says
`say` first.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import json
import statistics
import sys
import time
from typing import Any

HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
QUIET_SECONDS, PATIENCE_SECONDS = 0.5, 60.0


class Count:
    """Frames of all clients; `reached` is set when there are as many as wanted."""

    def __init__(self) -> None:
        self.frames, self.wanted = 0, 0
        self.reached = asyncio.Event()

    def expect(self, frames: int) -> None:
        """Count anew."""
        self.frames, self.wanted = 0, frames
        self.reached.clear()

    def add(self) -> None:
        """One more."""
        self.frames += 1
        if self.frames == self.wanted:
            self.reached.set()


class Client(asyncio.Protocol):
    """One socket; it reads text frames and nothing else."""

    def __init__(self, path: str, say: str | None, count: Count, ready: asyncio.Future[None]) -> None:
        self._path, self._say, self._count, self._ready = path, say, count, ready
        self._buffer = b""
        self._open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(HANDSHAKE.format(path=self._path).encode())

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if not self._open:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                return
            if b" 101 " not in buffer[:16]:
                raise SystemExit(f"no socket: {buffer[:300]!r}")
            self._open, buffer = True, buffer[end + 4 :]
            if self._say is not None:
                self._transport.write(_masked(self._say.encode()))
            self._ready.set_result(None)
        self._buffer = self._frames(buffer)

    def _frames(self, buffer: bytes) -> bytes:
        at = 0
        while len(buffer) - at >= 2:
            size, start = buffer[at + 1] & 0x7F, at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                size, start = int.from_bytes(buffer[start : start + width], "big"), start + width
            if len(buffer) < start + size:
                break
            if buffer[at] & 0x0F == 1:
                self._count.add()
            at = start + size
        return buffer[at:]


def _masked(text: bytes) -> bytes:
    """A short text frame of a client; the mask is zero, so the text is itself."""
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text


class Emitter:
    """A connection that makes events."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port, self._request = port, request

    async def emit(self) -> None:
        """One request, answered."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 20" not in head[:14]:
            raise SystemExit(f"no event: {head!r} {await reader.read(500)!r}")
        writer.close()


def _same(client: Client) -> Client:
    return client


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job."""
    loop, count = asyncio.get_running_loop(), Count()
    for start in range(0, len(job["paths"]), 50):
        opening = []
        for path in job["paths"][start : start + 50]:
            ready: asyncio.Future[None] = loop.create_future()
            client = Client(path, job["say"], count, ready)
            await loop.create_connection(functools.partial(_same, client), "127.0.0.1", job["port"])
            opening.append(ready)
        await asyncio.wait_for(asyncio.gather(*opening), PATIENCE_SECONDS)
    await asyncio.sleep(QUIET_SECONDS)
    clients, emitter = len(job["paths"]), Emitter(job["port"], base64.b64decode(job["emit"]))
    waits = []
    for _ in range(job["single"]):
        count.expect(clients * job["events"])
        began = time.perf_counter()
        await emitter.emit()
        await asyncio.wait_for(count.reached.wait(), PATIENCE_SECONDS)
        waits.append(time.perf_counter() - began)
    rates = []
    for _ in range(job["bursts"]):
        count.expect(clients * job["events"] * job["burst"])
        began = time.perf_counter()
        await asyncio.gather(*[emitter.emit() for _ in range(job["burst"])])
        await asyncio.wait_for(count.reached.wait(), PATIENCE_SECONDS)
        rates.append(count.frames / (time.perf_counter() - began))
    return {
        "clients": clients,
        "per_second": statistics.median(rates),
        "rates": rates,
        "last_ms": statistics.median(waits) * 1000,
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    gc.disable()
    print(json.dumps(asyncio.run(run(given))))
