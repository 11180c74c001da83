"""A receiver of webhooks: an HTTP server on the loopback interface that keeps what it receives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, Self

from standardwebhooks import Webhook

ANSWERS = {200: b"OK", 204: b"", 302: b"", 410: b"Gone", 429: b"Later", 500: b"Broken", 503: b"Later"}


class Message(NamedTuple):
    """A request: its headers (lower-case names), its body as it came, and when it came by the receiver's clock."""

    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    def verify(self, secret: str) -> Any:
        """Verify signature and time with an independent library; raises an exception if one is wrong."""
        return Webhook(encoded(secret)).verify(self.body, self.headers)

    def verify_signature(self, secret: str) -> bool:
        """Whether the independent library makes the same signature. It does not look at the time."""
        moment = datetime.fromtimestamp(int(self.headers["webhook-timestamp"]), UTC)
        made = Webhook(encoded(secret)).sign(self.id, moment, self.body.decode())
        return made in self.headers["webhook-signature"].split()


def encoded(secret: str) -> str:
    """The secret as the library wants it: a text that is no `whsec_` secret stands for its bytes."""
    return secret if secret.startswith("whsec_") else base64.b64encode(secret.encode()).decode()


class Receiver:
    """A receiver on `host`. It answers with `status`, or not at all while `hangs` is set. Use it with `async with`."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        status: int = 200,
        hangs: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host, self.status, self.hangs, self.port, self.now = host, status, hangs, 0, now
        self.answer_headers: Mapping[str, str] = {}
        self.answer: bytes | None = None
        self.seconds = 0.0
        self.messages: list[Message] = []
        self.running = self.most_running = 0
        self.doubled = 0  # requests that came while another with the same id was still running
        self._now_running: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._arrived = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/hook"

    @property
    def ids(self) -> set[str]:
        return {message.id for message in self.messages}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port: from now on, connections are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def wait_for(self, count: int, *, seconds: float = 60.0) -> list[Message]:
        """Wait until so many messages have come, and return them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self.messages) < count:
                    self._arrived.clear()
                    await self._arrived.wait()
        return self.messages

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
            pairs = [line.partition(":") for line in head[1:] if line]
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            await self._answer(Message(headers, body, self.now()), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, message: Message, writer: asyncio.StreamWriter) -> None:
        self.messages.append(message)
        self._arrived.set()
        key = message.headers.get("webhook-id", "")
        self.doubled += self._now_running[key] > 0
        self._now_running[key] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(3600 if self.hangs else self.seconds)
            content = ANSWERS.get(self.status, b"") if self.answer is None else self.answer
            extra = "".join(f"{name}: {value}\r\n" for name, value in self.answer_headers.items())
            length = f"Content-Length: {len(content)}\r\nConnection: close\r\n"
            writer.write(f"HTTP/1.1 {self.status} X\r\n{length}{extra}\r\n".encode() + content)
            await writer.drain()
        finally:
            self.running -= 1
            self._now_running[key] -= 1
