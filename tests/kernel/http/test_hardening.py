"""What a hostile peer does to the socket: oversized, endless, slow and broken requests (T1, T8, T9 of the hardening
table).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import psutil
import pytest
from tests.limits import within

from corral.schema.strict_json import parse_json
from corral.testing.kit import Kit

pytestmark = pytest.mark.one_engine

SHORT_TIMEOUT = pytest.mark.parametrize("probe", [{"server.body_timeout_seconds": 1}], indirect=True)


async def talk(port: int, head: str, *chunks: bytes, wait: float = 60.0) -> tuple[bytes, float]:
    """Send bytes as they are; what came back and after how long."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.replace("\n", "\r\n").encode())
        for chunk in chunks:
            writer.write(chunk)
        await writer.drain()
        async with within(wait):
            answer = await reader.read(65536)
        return answer, time.monotonic() - began
    finally:
        writer.close()


async def token(probe: Kit) -> str:
    return (await probe.as_user()).token or ""


async def test_t1_a_declared_length_over_the_cap_is_refused_at_once(probe: Kit, port: int) -> None:
    head = (
        f"POST /api/v1/probe/things HTTP/1.1\nHost: localhost\nAuthorization: Bearer {await token(probe)}\n"
        f"Content-Type: application/json\nContent-Length: {10 * 2**30}\n\n"
    )
    answer, _ = await talk(port, head, b"{", wait=4)  # before the body is overdue
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer


async def test_conventions_3_an_endless_chunked_body_is_413_and_costs_no_memory(probe: Kit, port: int) -> None:
    before = psutil.Process().memory_info().rss
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /api/v1/probe/things HTTP/1.1\nHost: localhost\nAuthorization: Bearer {await token(probe)}\n"
        "Content-Type: application/json\nTransfer-Encoding: chunked\n\n"
    )
    writer.write(head.replace("\n", "\r\n").encode())
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answering = asyncio.ensure_future(reader.read(65536))
    with contextlib.suppress(OSError):
        for _ in range(2000):
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0)
            if answering.done():
                break
    async with asyncio.timeout(60):
        answer = await answering
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert psutil.Process().memory_info().rss - before < 32 * 2**20


@SHORT_TIMEOUT
async def test_t9_a_body_without_progress_is_408(probe: Kit, port: int) -> None:
    head = (
        f"POST /api/v1/probe/things HTTP/1.1\nHost: localhost\nAuthorization: Bearer {await token(probe)}\n"
        "Content-Type: application/json\nContent-Length: 100\n\n"
    )
    answer, _ = await talk(port, head, b'{"title":', wait=3)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


async def test_t8_slow_headers_are_closed(port: int) -> None:
    answer, took = await talk(port, "GET /health HTTP/1.1\nHost: local", wait=8)
    assert answer == b""
    assert took > 3


@pytest.mark.parametrize("head", ["GET /", "GET / HTTP/1.1\nHost: localhost\nX-Long: ", "POST / HTTP/1.1\nX: y\n"])
async def test_a_head_without_an_end_is_refused_and_kept_nowhere(port: int, head: str) -> None:
    answer, _ = await talk(port, head, *[b"a" * 4000] * 10, wait=3)
    assert answer.startswith(b"HTTP/1.1 431 "), answer


@pytest.mark.parametrize("tail", ["1;" + "a" * 40_000, "0\r\nX: " + "a" * 40_000, "0\r\n" + "a: b\r\n" * 9_000])
async def test_extensions_and_trailers_without_an_end_end_the_connection(probe: Kit, port: int, tail: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /api/v1/probe/echo HTTP/1.1\nHost: localhost\nAuthorization: Bearer {await token(probe)}\n"
        "Content-Type: application/json\nTransfer-Encoding: chunked\n\n"
    )
    writer.write(head.replace("\n", "\r\n").encode())
    for at in range(0, len(tail), 5000):
        writer.write(tail[at : at + 5000].encode())
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1 2" not in await reader.read()
    writer.close()


async def test_trailers_are_no_headers(probe: Kit, port: int) -> None:
    """A proxy in front has not seen them, and the gates have run."""
    head = (
        "POST /api/v1/probe/echo HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        "Transfer-Encoding: chunked\nConnection: close\n\n"
    )
    trailer = f"Authorization: Bearer {await token(probe)}\r\n\r\n".encode()
    answer, _ = await talk(port, head, b'd\r\n{"title":"a"}\r\n0\r\n' + trailer)
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    paths = ["/health", "/nothing", "/health"]
    last = "GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    writer.write("".join([*(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in paths), last]).encode())
    async with asyncio.timeout(60):
        answers = await reader.read()
    writer.close()
    assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200", b"404"]


async def test_an_upgrade_that_is_not_taken_hides_no_request(port: int) -> None:
    first = "POST /health HTTP/1.1\nHost: localhost\nConnection: Upgrade\nUpgrade: other\nContent-Length: 4\n\n"
    second = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first.replace("\n", "\r\n").encode() + b"body" + second)
    async with asyncio.timeout(60):
        statuses = [part[:3] for part in (await reader.read()).split(b"HTTP/1.1 ")[1:]]
    writer.close()
    assert statuses in ([b"405"], [b"405", b"200"])  # uvicorn closes the connection, Hypercorn goes on


async def test_oversized_headers_and_nonsense(port: int) -> None:
    answer, _ = await talk(port, "GET /health HTTP/1.1\nHost: localhost\nX-Long: " + "a" * 40_000 + "\n\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in answer
    answer, _ = await talk(port, "NONSENSE\n\n")
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("upgrade", ["h2c", "H2C"])
async def test_no_connection_becomes_one_that_a_proxy_does_not_look_into(port: int, upgrade: str) -> None:
    """A proxy that lets WebSockets through passes this on, and would take what follows for their frames."""
    head = f"Host: localhost\nConnection: Upgrade, HTTP2-Settings\nUpgrade: {upgrade}\nHTTP2-Settings: AAMAAABk\n\n"
    for line in ("GET /health", "OPTIONS /health", "PRI /health"):
        answer, _ = await talk(port, f"{line} HTTP/1.1\n{head}")
        assert answer[9:12] in (b"200", b"204", b"405", b"400" if line.startswith("PRI") else b""), answer


async def test_a_body_whose_length_is_told_in_two_ways_ends_the_connection(port: int) -> None:
    head = "POST /api/v1/auth/login HTTP/1.1\nHost: localhost\nContent-Length: 4\nTransfer-Encoding: chunked\n\n"
    hidden = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + hidden)
    async with asyncio.timeout(60):
        answers = await reader.read()  # up to the end of the connection
    writer.close()
    assert answers.startswith(b"HTTP/1.1 400 ")
    assert answers.count(b"HTTP/1.1 ") == 1


async def test_a_client_that_leaves_in_the_middle_disturbs_nobody(probe: Kit, port: int) -> None:
    head = (
        f"POST /api/v1/probe/things HTTP/1.1\nHost: localhost\nAuthorization: Bearer {await token(probe)}\n"
        "Content-Type: application/json\nContent-Length: 100\n\n"
    )
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.replace("\n", "\r\n").encode() + b"{")
        await writer.drain()
        writer.close()
    answer, _ = await talk(port, "GET /health HTTP/1.1\nHost: localhost\n\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    async with asyncio.timeout(60):
        while probe.kernel.metrics.in_flight:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)


async def test_refused_bodies_are_counted_by_reason(probe: Kit) -> None:
    member, path = await probe.as_user(), "/probe/echo"
    assert (await member.post(path, {"title": "x" * 70_000})).status == 413
    for body, kind in ((b"{", "application/json"), (b'{"a":1,"a":1}', "application/json"), (b"{}", "text/plain")):
        await member.request("POST", path, content=body, headers={"Content-Type": kind})
    assert (await member.post(path, {"no": "field"})).status == 422
    text = (await probe.client.get("/metrics", root=True)).body.decode()
    counted = {line for line in text.splitlines() if line.startswith("corral_http_body_rejected_total{")}
    assert counted == {
        'corral_http_body_rejected_total{reason="malformed_json"} 2.0',
        'corral_http_body_rejected_total{reason="payload_too_large"} 1.0',
        'corral_http_body_rejected_total{reason="unsupported_media_type"} 1.0',
    }


async def test_t17_large_bodies_are_parsed_beside_the_loop(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, is_beside = threading.Event(), list[bool]()

    def slowly(body: bytes, **options: bool) -> object:
        is_beside.append(go_on.wait(20))
        return parse_json(body, **options)

    monkeypatch.setattr("corral.asgi.endpoint.parse_json", slowly)
    body = b"{" + b",".join(b'"k%06d":1' % number for number in range(6000)) + b"}"
    answering = asyncio.create_task(kit.client.request("POST", "/auth/login", content=body))
    await asyncio.sleep(0.05)
    go_on.set()  # nobody would, if the loop were where it is parsed
    assert (await answering).status == 422
    assert is_beside == [True]
