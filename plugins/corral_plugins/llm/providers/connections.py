"""Connections to a provider: HTTP/1.1 of `httpcore2` on the guarded network, each for one request at a time.

A client of `httpx2` takes twice the processor time for a request, and its pool looks at all of its connections, with a
system call each, whenever a request begins or ends.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from corral.egress.client import Egress
from corral.egress.guard import Destination, EgressBlocked, Policy, read_url
from corral_plugins.llm.api import ProviderConnection, ProviderError

if TYPE_CHECKING:
    import httpcore2

SINK = "llm"
MAX_IDLE, IDLE_SECONDS = 1000, 15.0  # calls are limited by concurrency slots
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
# A compressed response would have to be decompressed in limited steps, and streams would arrive later.
HEADERS = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "corral"}


class ProviderConnections:
    """Sends requests to one provider, and keeps the connections for further requests."""

    def __init__(self, egress: Egress, provider: ProviderConnection) -> None:
        self._egress, self._provider = egress, provider
        self._idle: deque[httpcore2.AsyncHTTPConnection] = deque()  # the one that was used last at the end
        self._is_closed = False

    def serves(self, provider: ProviderConnection) -> bool:
        """Return whether the connections are still those of the provider, because its configuration has not changed."""
        own = self._provider
        return (own.version, own.base_url, own.timeouts) == (provider.version, provider.base_url, provider.timeouts)

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> AsyncIterator[httpcore2.Response]:
        """Send a request and yield its response, whose body `read_body` yields. Raise `ProviderError`.

        The connection is kept if the body was read to its end, and closed otherwise.
        """
        connection: httpcore2.AsyncHTTPConnection | None = None
        response: httpcore2.Response | None = None
        target: Destination | None = None
        try:
            policy = self._policy()
            target = self._egress.check_url(url, policy)
            request = _request(method, target, {**HEADERS, **headers}, content, self._provider.timeouts.connect_seconds)
            connection = await self._take(request.url.origin, policy)
            response = await connection.handle_async_request(request)
            self._egress.count(SINK, "answered", target.host)
            yield response
        except Exception as error:
            outcome, converted = _converted(error, self._provider)
            if response is None:
                self._egress.count(SINK, outcome, host_and_port(url) if target is None else target.host)
            if converted is None:
                raise
            raise converted from error
        finally:
            if response is not None:
                await response.aclose()
            if connection is not None:
                await self._give_back(connection)

    def _policy(self) -> Policy:
        """Return what the requests may reach: the address in the operator's configuration even if it is private."""
        if not self._provider.operator:
            return Policy()
        base = read_url(self._provider.base_url or "")
        return Policy(operator=frozenset({(base.host, base.port)}))

    async def _take(self, origin: httpcore2.Origin, policy: Policy) -> httpcore2.AsyncHTTPConnection:
        """Return the connection that was used last, which is the most likely one to be still open, or a new one."""
        import httpcore2

        from corral_plugins.llm.providers.asyncio_network import AsyncioNetwork

        while self._idle:
            connection = self._idle.pop()
            if not connection.has_expired():
                return connection
            await connection.aclose()
        return httpcore2.AsyncHTTPConnection(
            origin,
            ssl_context=self._egress.tls_context(),
            keepalive_expiry=IDLE_SECONDS,
            network_backend=self._egress.network(policy, AsyncioNetwork()),
        )

    async def _give_back(self, connection: httpcore2.AsyncHTTPConnection) -> None:
        """Keep the connection if it can serve a further request, and close one that was idle for too long."""
        is_open = connection.is_idle() and not connection.is_closed()
        if self._is_closed or not is_open or len(self._idle) >= MAX_IDLE:
            await connection.aclose()
            return
        self._idle.append(connection)
        if self._idle[0].has_expired():
            await self._idle.popleft().aclose()

    async def close(self) -> None:
        """Close the idle connections. The others are closed after their request."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().aclose()


async def read_body(response: httpcore2.Response) -> AsyncIterator[bytes]:
    """Yield the body of a response. Raise `ProviderError` if it is too large, or encoded although that was refused."""
    encoding = header_of(response, b"content-encoding")
    if encoding not in ("", "identity"):
        raise ProviderError(502, f"The response has the content encoding {encoding[:40]}, which was not requested.")
    assert isinstance(response.stream, AsyncIterable)
    left = MAX_RESPONSE_BYTES
    async for chunk in response.stream:
        left -= len(chunk)
        if left < 0:
            raise ProviderError(502, f"The response is larger than {MAX_RESPONSE_BYTES} bytes.")
        yield chunk


def header_of(response: httpcore2.Response, name: bytes) -> str:
    """Return the value of a response header, or an empty text. `name` is in lower case."""
    values = (value for given, value in response.headers if given.lower() == name)
    return next(values, b"").decode("latin1").strip()


def _request(
    method: str, target: Destination, headers: Mapping[str, str], content: bytes | None, connect_seconds: float
) -> httpcore2.Request:
    import httpcore2

    url = target.url
    sent = [(b"host", url.netloc), *((name.encode(), value.encode()) for name, value in headers.items())]
    if content is not None:
        sent.append((b"content-length", b"%d" % len(content)))
    return httpcore2.Request(
        method,
        httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=sent,
        content=content,
        extensions={"timeout": {"connect": connect_seconds}},
    )


def _converted(error: Exception, provider: ProviderConnection) -> tuple[str, ProviderError | None]:
    """Return the outcome of a failed request, for the metrics, and the error of the provider, if it is one."""
    import httpcore2

    address = host_and_port(provider.base_url)
    if isinstance(error, EgressBlocked):
        detail = f"The address {address} is blocked ({error.code}): {error.reason}"
        return "blocked", ProviderError(503, detail, code="dependency_unavailable")
    if isinstance(error, httpcore2.TimeoutException):
        return "timed_out", ProviderError(504, f"{address} did not respond in time ({type(error).__name__}).")
    if isinstance(error, httpcore2.NetworkError | httpcore2.ProtocolError | httpcore2.ProxyError):
        return "failed", ProviderError(502, f"{address} cannot be reached: {type(error).__name__}: {error}")
    return "failed", None


def host_and_port(url: str | None) -> str:
    """Return `host:port` of a URL."""
    parts = urlsplit(url or "")
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
