"""S9: connections whose headers, or whose bodies, never come: the first are closed within 15 s, the second get 408
within 60 s, and meanwhile others are answered as if there were none.

Short form: 60 of each; long form (`--long`): 500 of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from corral.testing.server import ServerProcess

pytestmark = pytest.mark.one_engine

CLOSED_WITHIN, TOLD_WITHIN, P99_MS = 15.0, 60.0, 500.0
DRIP_SECONDS = 1.0
HEADERS = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
BODY = (
    b"POST /api/v1/auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 5000\r\n\r\n{"email":'
)


class Slow:
    """One connection that says its beginning and, with `drip`, a byte now and then."""

    def __init__(self, port: int, beginning: bytes, *, drip: bool) -> None:
        self._port, self._beginning, self._drip = port, beginning, drip
        self.status, self.seconds = 0, float("inf")

    async def run(self, longest: float) -> None:
        """Until the server ends it, or it has taken too long."""
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._beginning)
        dripping = asyncio.create_task(self._write(writer)) if self._drip else None
        answer = b""
        try:
            async with asyncio.timeout(longest):
                with contextlib.suppress(ConnectionError):
                    while chunk := await reader.read(4096):
                        answer += chunk
                        if b"\r\n\r\n" in answer:
                            break
            self.seconds = time.monotonic() - began
        except TimeoutError:
            pass
        finally:
            if dripping is not None:
                dripping.cancel()
            writer.close()
        self.status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0

    @staticmethod
    async def _write(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(DRIP_SECONDS)
                writer.write(b"a")
                await writer.drain()


async def ask(port: int, token: str, pause: float, stop: asyncio.Event) -> list[float]:
    """A client that asks again and again, with a pause between; how long each answer took, in milliseconds."""
    took: list[float] = []
    head = {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        while not stop.is_set():
            began = time.perf_counter()
            answer = await client.get("/api/v1/tasks", headers=head)
            took.append((time.perf_counter() - began) * 1000)
            assert answer.status_code == 200, answer.text
            await asyncio.sleep(pause)
    return took


async def attack(port: int, token: str, number: int, pause: float) -> tuple[list[Slow], list[Slow], list[float]]:
    """So many slow headers, half of them dripping, and so many slow bodies, while four clients ask."""
    headers = [Slow(port, HEADERS, drip=place % 2 == 0) for place in range(number)]
    bodies = [Slow(port, BODY, drip=False) for _ in range(number)]
    stop = asyncio.Event()
    asking = [asyncio.create_task(ask(port, token, pause, stop)) for _ in range(4)]
    await asyncio.gather(
        *[slow.run(CLOSED_WITHIN + 15) for slow in headers], *[slow.run(TOLD_WITHIN + 15) for slow in bodies]
    )
    stop.set()
    took = [each for client in await asyncio.gather(*asking) for each in client]
    return headers, bodies, sorted(took)


async def test_s09_slow_connections_are_ended_and_hold_up_nobody(
    tmp_path: Path, database_url: str, long_form: bool, figure: Callable[[str, dict[str, Any]], None]
) -> None:
    with ServerProcess(tmp_path, database_url=database_url) as server, server.sign_in() as client:
        token = client.headers["authorization"].removeprefix("Bearer ")
        number, pause = (500, 0.02) if long_form else (60, 0.2)
        headers, bodies, took = await attack(server.port, token, number, pause)
        after = client.get("/tasks").status_code
    p99 = took[int(len(took) * 0.99)]
    figures: dict[str, Any] = {
        "connections": len(headers) + len(bodies),
        "headers_closed_s": round(max(slow.seconds for slow in headers), 1),
        "bodies_told_s": round(max(slow.seconds for slow in bodies), 1),
        "answers_of_bodies": dict(Counter(slow.status for slow in bodies)),
        "requests_meanwhile": len(took),
        "p99_ms": round(p99),
    }
    figure("S9", figures)
    assert figures["headers_closed_s"] <= CLOSED_WITHIN
    assert figures["bodies_told_s"] <= TOLD_WITHIN
    assert {slow.status for slow in headers} <= {0, 400, 408}
    assert {slow.status for slow in bodies} == {408}
    assert after == 200
    assert p99 <= P99_MS
