"""S10: bodies that are too large, that do not end, of very many parts, too deep, compressed, at a real server: each is
refused, the first at once, and the process grows by 32 MiB at most.

Short form: 10 of each, 10 at a time; long form (`--long`): 200 of each, 50 at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from corral.testing.server import ServerProcess

pytestmark = pytest.mark.one_engine

MIB = 2**20
MOST_MEMORY, AT_ONCE_MS = 32 * MIB, 100
DECLARED, ENDLESS = 10 * 2**30, 400  # bytes that are announced; pieces of 64 KiB that are sent if nobody stops it
REST = 7  # seconds; what is free goes back within two looks of `corral_core.health.service.heap_trimming`
PARTS = b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n"


def bodies() -> dict[str, tuple[bytes, str, set[int]]]:
    """What is sent as a body, as which type, and the statuses that refuse it."""
    keys = b"{" + b",".join(b'"k%d":1' % number for number in range(70_000)) + b"}"
    return {
        "declared": (b"{", f"application/json\nContent-Length: {DECLARED}", {413}),
        "one byte too many": (b'"' + b"a" * MIB, "application/json", {413}),
        "deep lists": (b"[" * (MIB - 1), "application/json", {400}),
        "deep objects": (b'{"a":' * 200_000, "application/json", {400}),
        "many names": (keys, "application/json", {422}),
        "one long text": (b'{"title":"' + b"a" * (MIB - 100) + b'"}', "application/json", {422}),
        "many numbers": (b"[" + b"1," * 500_000 + b"1]", "application/json", {422}),
        "a long number": (b'{"title":' + b"9" * 1_000_000 + b"}", "application/json", {400, 422}),
        "escapes": (b'{"title":"' + b"\\ud83d\\ude00" * 80_000 + b'"}', "application/json", {422}),
        "many parts": (PARTS * 20_000 + b"--x--", "multipart/form-data; boundary=x", {415}),
        "no boundary": (b"a" * 1000, "multipart/form-data", {415}),
        "compressed": (gzip.compress(b"a" * 100 * MIB), "application/json\nContent-Encoding: gzip", {413, 415}),
    }


class Hostile:
    """Sends what no client would."""

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token = port, token
        self.statuses: dict[str, Counter[int]] = {}
        self.first_ms: dict[str, float] = {}

    def head(self, media: str, length: int | None) -> bytes:
        lines = ["POST /api/v1/tasks HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}"]
        lines.append(f"Content-Type: {media}")
        if length is None:
            lines.append("Transfer-Encoding: chunked")
        elif "Content-Length" not in media:
            lines.append(f"Content-Length: {length}")
        return ("\n".join(lines) + "\n\n").replace("\n", "\r\n").encode()

    async def send(self, what: str, head: bytes, pieces: AsyncIterator[bytes]) -> None:
        """One request; writing stops when the answer has come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=MIB)
        began = time.perf_counter()
        writer.write(head)
        answering = asyncio.ensure_future(reader.readline())
        with contextlib.suppress(OSError):
            async for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if answering.done():
                    break
        async with asyncio.timeout(60):
            line = await answering
        took = (time.perf_counter() - began) * 1000
        writer.close()
        found = re.match(rb"HTTP/1.1 (\d+) ", line)
        self.statuses.setdefault(what, Counter())[int(found[1]) if found else 0] += 1
        self.first_ms[what] = min(took, self.first_ms.get(what, took))

    async def storm(self, count: int, at_once: int) -> None:
        """So many of each."""
        sent: list[tuple[str, bytes, Callable[[], AsyncIterator[bytes]] | None]] = [
            (what, self.head(media, len(body)), whole(body)) for what, (body, media, _) in bodies().items()
        ]
        sent.append(("endless", self.head("application/json", None), None))
        gate = asyncio.Semaphore(at_once)

        async def one(what: str, head: bytes, pieces: Callable[[], AsyncIterator[bytes]] | None) -> None:
            async with gate:
                await self.send(what, head, (pieces or endless)())

        await asyncio.gather(*[one(*each) for _ in range(count) for each in sent])


def whole(body: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def pieces() -> AsyncIterator[bytes]:
        yield body

    return pieces


async def endless() -> AsyncIterator[bytes]:
    """A chunked body without an end."""
    for _ in range(ENDLESS):
        yield b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        await asyncio.sleep(0)


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, database_url=database_url) as server:
        yield server


def memory(server: ServerProcess) -> int:
    """The memory of the server and whatever it started."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


async def test_s10_hostile_bodies(server: ServerProcess, long_form: bool, figure: Any) -> None:
    token = server.sign_in().headers["Authorization"].removeprefix("Bearer ")
    hostile = Hostile(server.port, token)
    await hostile.storm(2, 2)  # what is made once is made
    before = memory(server)
    count, at_once = (200, 50) if long_form else (10, 10)
    await hostile.storm(count, at_once)
    await asyncio.sleep(REST)
    rise = memory(server) - before
    with server.client(token) as client:
        assert client.get("/tasks").json()["total"] == 0
    refused = {what: statuses for what, (_, _, statuses) in bodies().items()} | {"endless": {413}}
    wrong = {what: found for what, found in hostile.statuses.items() if not found.keys() <= refused[what]}
    answers = sum(hostile.statuses.values(), Counter())
    figures = {
        "requests": answers.total(),
        "server_errors": sum(number for status, number in answers.items() if status >= 500),
        "first_refusal_ms": round(hostile.first_ms["declared"]),
        "memory_rise_mib": round(rise / MIB, 1),
    }
    figure("S10", figures)
    assert not wrong
    assert hostile.first_ms["declared"] <= AT_ONCE_MS
    assert rise <= MOST_MEMORY
