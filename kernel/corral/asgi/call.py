"""One request and its answer, free of any framework: what the stages pass on."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from corral.auth.principal import Principal
from corral.errors import Malformed, Problem, TooLarge
from corral.ids import new_id
from corral.plugin import Meter, Quota

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

LINGER_SECONDS = 0.5

Receive = Callable[[], Awaitable[Any]]


class Gone(Exception):
    """The client has left; nobody waits for the answer."""


class Call:
    """A request as it came. Header names are lower-case bytes."""

    __slots__ = (
        "_timeout",
        "caller",
        "client_ip",
        "headers",
        "inside",
        "may_have_body",
        "method",
        "path",
        "query",
        "quota",
        "receive",
        "request_id",
        "scope",
        "unread",
    )

    def __init__(self, scope: Mapping[str, Any], receive: Receive, body_timeout: float) -> None:
        self.scope = scope
        self.receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.client_ip = ""
        self.caller: Principal | None = None  # once it is known
        self.quota: Quota | None = None  # the tightest limit that this request counts for
        self.inside: tuple[tuple[Meter, Principal], ...] = ()
        given = self.headers.get(b"x-request-id")
        text = given.decode("latin1") if given is not None else ""
        self.request_id = text if given is not None and _REQUEST_ID.fullmatch(text) else new_id()
        self._timeout = body_timeout
        silent = b"1" if scope["http_version"] >= "2" else b"0"  # there nothing announces a body: its end tells
        self.may_have_body = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", silent) != b"0"
        self.unread = self.may_have_body

    def count(self, quota: Quota | None) -> None:
        """A limit that the request counts for."""
        if quota is not None and (self.quota is None or quota.remaining < self.quota.remaining):
            self.quota = quota

    def header(self, name: bytes) -> str | None:
        """A header's value."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin1")

    def once(self, *names: bytes) -> None:
        """`malformed_request` when one of these headers comes twice: nobody could say which one counts."""
        headers = self.scope["headers"]
        if len(headers) != len(self.headers):
            for name in names:
                if sum(given == name for given, _ in headers) > 1:
                    raise Malformed(f"The header {name.decode()} comes twice; send it once.")

    async def read(self, limit: int) -> bytes:
        """The whole body, counted as it comes: `payload_too_large` over `limit`, 408 for no progress, `Gone` if cut."""
        header = self.headers.get(b"content-length")
        declared = None
        if header is not None:
            if not header.isdigit() or len(header) > 18:
                raise Malformed("Content-Length is not a number of bytes.")
            declared = int(header)
            if declared > limit:
                raise TooLarge(f"The body is {declared} bytes, at most {limit} are taken here.")
        try:
            return await self._parts(limit, declared)
        except TimeoutError:
            raise Problem(
                f"No byte of the body came for {self._timeout:g} seconds.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None

    async def _parts(self, limit: int, declared: int | None) -> bytes:
        parts: list[bytes] = []
        size = 0
        async with asyncio.timeout(self._timeout) as patience:
            while True:
                message = await self.receive()
                if message["type"] != "http.request":
                    self.unread = False
                    raise Gone
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise TooLarge(f"The body is larger than the {limit} bytes that are taken here.")
                if part:
                    parts.append(part)
                if size == declared or not message.get("more_body", False):
                    self.unread = False
                    return parts[0] if len(parts) == 1 else b"".join(parts)
                patience.reschedule(asyncio.get_running_loop().time() + self._timeout)

    async def discard(self) -> None:
        """Take what is still sent of a refused body, for a moment: closing at once would reset the connection, and the
        answer be lost.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self.unread:
                    message = await self.receive()
                    self.unread = message["type"] == "http.request" and message.get("more_body", False)

    async def left(self) -> None:
        """Return when the client has left. Only after the body was read."""
        while (await self.receive())["type"] == "http.request":
            continue


class Reply:
    """An answer: bytes, or a stream of them. `close` asks the server to end the connection (an unread body)."""

    __slots__ = ("body", "chunks", "headers", "is_whole", "media_type", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        media_type: bytes = b"application/json",
        chunks: AsyncIterator[bytes] | None = None,
        is_whole: Callable[[], bool] = lambda: True,
    ) -> None:
        self.status, self.body = status, body
        self.headers: dict[str, str] = dict(headers) if headers else {}
        self.media_type = media_type
        self.chunks = chunks
        self.is_whole = is_whole
