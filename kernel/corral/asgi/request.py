"""Defines incoming HTTP requests, which pass through the stages of the pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from corral.database.unit import ANONYMOUS, UnitContext
from corral.errors import Malformed, Problem, TooLarge
from corral.http.answers import Request
from corral.ids import new_id
from corral.plugin import RateLimiter, RateLimitQuota

if TYPE_CHECKING:
    from corral.asgi.endpoint import Endpoint
    from corral.auth.principal import Principal
    from corral.http.idempotency import IdempotencyKey

LINGER_SECONDS = 0.5
RECEIVED = "corral.received"
"""The key of an ASGI scope extension.

Its value is a function that returns whether `receive` would return without waiting.

If so, the pipeline does not start the timer that limits the wait for the body. The timer accounts for 2 % of the time
that a small write request takes, and most bodies arrive together with the request head.
"""
WHOLE_RESPONSE = "corral.response"
"""The key of the ASGI scope extension that a server sets if it accepts a whole response as a single message.

The key is also the `type` of this message. The message contains the `status`, the `headers` in lower case, including
the `content-length`, and the whole `body`.
"""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

Receive = Callable[[], Awaitable[Any]]
T = TypeVar("T")


class ClientLeft(Exception):
    """Raised when the client closed the connection before it received the whole response."""


class IncomingRequest(Request):
    """A request read from an ASGI scope. Each stage of the pipeline adds its results as attributes."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, body_timeout: float) -> None:
        self.scope = scope
        self.receive = receive
        self.method: str = scope.get("method", "GET")  # the scope of a WebSocket contains no method
        self.path: str = scope["path"]
        self.label = f"{self.method} {self.path}"
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.peer: str = (scope.get("client") or ("",))[0]
        self.forwarded_for = self.headers.get(b"x-forwarded-for", b"")
        if len(self.headers) < len(scope["headers"]):  # each proxy may add its own line
            self.forwarded_for = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
        self.client_ip = ""
        self.endpoint: Endpoint | None = None  # set by the route stage
        self.path_names: dict[str, str] = {}
        self.principal: Principal | None = None  # set by the principal stage
        self.quota: RateLimitQuota | None = None  # the tightest rate limit that this request counts against
        self.arguments: dict[str, Any] = {}  # the handler's arguments, set by the input stage
        self.idempotency_key: IdempotencyKey | None = None
        self.metered: list[tuple[RateLimiter, Principal]] = []  # to be notified when the request ends
        self.has_credential = bool(self.headers.get(b"authorization") or self.headers.get(b"x-api-key"))  # valid or not
        given = self.headers.get(b"x-request-id")
        self.request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else new_id()
        self._body_timeout, self._size = body_timeout, 0
        self._is_received: Callable[[], bool] = (scope.get("extensions") or {}).get(RECEIVED, bool)
        silent = b"1" if scope["http_version"] >= "2" else b"0"  # HTTP/2 does not announce a body
        self.may_have_body = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", silent) != b"0"
        self.unread = self.may_have_body

    def header(self, name: str) -> str | None:
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin1")

    def unit_context(self, caller: Principal | None = None) -> UnitContext:
        actor = ANONYMOUS if caller is None else caller.actor
        agent = self.headers.get(b"user-agent")
        user_agent = None if agent is None else agent.decode("latin1")
        return UnitContext(self.label, actor, (), self.request_id, self.client_ip, user_agent)

    def keep_strictest_quota(self, quota: RateLimitQuota) -> None:
        """Record that the request counts against this rate limit.

        If several limits apply, only the one with the fewest remaining requests is kept for the `RateLimit-*` headers.
        """
        if self.quota is None or quota.remaining < self.quota.remaining:
            self.quota = quota

    def refuse_repeated(self, *headers: bytes) -> None:
        """Raise `malformed_request` if one of the headers is repeated, because its value would be ambiguous."""
        if len(self.headers) < len(self.scope["headers"]):
            names = [name for name, _ in self.scope["headers"]]
            if repeated := [name.decode() for name in headers if names.count(name) > 1]:
                raise Malformed(f"The header {repeated[0]} occurs twice; send it once.")

    async def read(self, limit: int) -> bytes:
        """Return the whole body. Raises the same problems as `chunks`."""
        body = await self._next_chunk(limit) if self.unread else b""  # most bodies are a single chunk
        return body + b"".join([chunk async for chunk in self.chunks(limit)]) if self.unread else body

    async def chunks(self, limit: int) -> AsyncIterator[bytes]:
        """Iterate over the chunks of the body as they arrive.

        Raise `payload_too_large` if the body exceeds `limit` bytes, `request_timeout` if no bytes arrive in time, and
        `ClientLeft` if the client disconnects before the end of the body.
        """
        while self.unread:
            yield await self._next_chunk(limit)

    async def _next_chunk(self, limit: int) -> bytes:
        declared = self.headers.get(b"content-length")
        if declared is not None and not (declared.isdigit() and len(declared) <= 18):
            raise Malformed("The Content-Length header is not a valid number of bytes.")
        if declared is not None and int(declared) > limit:
            raise TooLarge(f"The body is {int(declared)} bytes long; this operation accepts at most {limit} bytes.")
        message = await self.receive() if self._is_received() else await self._receive_in_time()
        if message["type"] != "http.request":
            self.unread = False
            raise ClientLeft
        part: bytes = message.get("body", b"")
        self._size += len(part)
        if self._size > limit:
            raise TooLarge(f"The body is larger than the {limit} bytes that this operation accepts.")
        self.unread = message.get("more_body", False) and (declared is None or self._size != int(declared))
        return part

    async def _receive_in_time(self) -> Any:
        try:
            async with asyncio.timeout(self._body_timeout):
                return await self.receive()
        except TimeoutError:
            detail = f"No bytes of the body arrived for {self._body_timeout:g} seconds."
            raise Problem(detail, code="request_timeout", headers={"Connection": "close"}) from None

    async def discard_body(self) -> None:
        """Read and discard the rest of a refused body, for at most `LINGER_SECONDS`.

        If the server closed the connection immediately, the connection would be reset, and the client would lose the
        response.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self.unread:
                    message = await self.receive()
                    self.unread = message["type"] == "http.request" and message.get("more_body", False)

    async def disconnected(self) -> None:
        """Wait until the client closes the connection. Call this method only after the body has been read."""
        while (await self.receive())["type"] == "http.request":
            continue


async def run_until_client_leaves(coroutine: Coroutine[Any, Any, T], leaving: asyncio.Future[Any]) -> T:
    """Run the coroutine and return its result.

    If the client disconnects first (`leaving` is done), cancel the coroutine and raise `ClientLeft`.
    """
    running = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientLeft
        return running.result()
    finally:
        leaving.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
