"""Servers on the loopback interface that behave as Slack, Telegram and further services do."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Self
from urllib.parse import parse_qsl


class Service:
    """An HTTP server that keeps what it receives. `answers` are statuses for the next requests, before 200.

    Like the services, it refuses what is too long, and tells after a 429 how long to wait.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.port = kind, 0
        self.answers: list[int] = []
        self.retry_after = 7
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def texts(self) -> list[str]:
        """The texts of the messages that were accepted."""
        return [body["text"] for _, headers, body in self.requests if headers["x-accepted"] == "yes"]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
            pairs = [line.partition(":") for line in head[1:] if line]
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            data = await reader.readexactly(int(headers.get("content-length", "0")))
            is_form = headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
            body = dict(parse_qsl(data.decode())) if is_form else json.loads(data)
            status, answer, further = self._answer(body, is_api="/api/" in head[0])
            headers["x-accepted"] = "yes" if status == 200 else "no"
            self.requests.append((head[0].split(" ")[1], headers, body))
            length = f"Content-Length: {len(answer)}\r\nConnection: close\r\n{further}\r\n"
            writer.write(f"HTTP/1.1 {status} X\r\n{length}".encode() + answer)
            await writer.drain()
        writer.close()

    def _answer(self, body: Any, *, is_api: bool) -> tuple[int, bytes, str]:
        status = self.answers.pop(0) if self.answers else 200
        if self.kind == "further":
            return status, b"{}", f"Retry-After: {self.retry_after}\r\n" if status == 429 else ""
        if self.kind == "slack":
            if len(body["text"]) > 40_000:
                return 400, b"msg_too_long", ""
            further = f"Retry-After: {self.retry_after}\r\n" if status == 429 else ""
            if is_api:
                return status, json.dumps({"ok": status == 200}).encode(), further
            return status, b"ok" if status == 200 else b"rate_limited", further
        if len(body["text"].encode("utf-16-le")) // 2 > 4096:
            status = 400
        told: dict[str, Any] = {"ok": status == 200, "error_code": status}
        if status == 429:
            told["parameters"] = {"retry_after": self.retry_after}
        return status, json.dumps(told).encode(), ""
