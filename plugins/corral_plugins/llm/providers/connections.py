"""HTTP/1.1 connections to a provider, checked by the egress guard. Each connection serves one request at a time.

An `httpx2` client would take twice the processor time for a request, because its pool makes a system call for every
connection whenever a request begins or ends.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from corral.egress.client import Egress
from corral.egress.guard import Destination, EgressBlocked, Policy, read_url
from corral_plugins.llm.api import ProviderConnection, ProviderError

if TYPE_CHECKING:
    import h11

    from corral_plugins.llm.providers.http1 import Http1Connection

SINK = "llm"
MAX_IDLE, IDLE_SECONDS = 1000, 15.0  # calls are limited by concurrency slots
MAX_RESPONSE_BYTES = 64 * 1024 * 1024
# A compressed response would have to be decompressed in limited steps, and streams would arrive later.
HEADERS = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "corral"}


class ProviderResponse:
    """A provider's response. Header names are in lower case."""

    def __init__(self, head: h11.Response, connection: Http1Connection) -> None:
        self.status: int = head.status_code
        self.headers = {name: value.decode("latin1") for name, value in reversed(list(head.headers))}
        self._connection = connection

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body.

        Raise `ProviderError` if the body is too large, or if it is compressed although the request forbids compression.
        """
        encoding = self.headers.get(b"content-encoding", "identity")
        if encoding not in ("", "identity"):
            detail = f"The response has the content encoding {encoding[:40]}, which was not requested."
            raise ProviderError(502, detail)
        left = MAX_RESPONSE_BYTES
        async for chunk in self._connection.chunks():
            left -= len(chunk)
            if left < 0:
                raise ProviderError(502, f"The response is larger than {MAX_RESPONSE_BYTES} bytes.")
            yield chunk


class ProviderConnections:
    """Sends requests to one provider, and keeps connections open for later requests."""

    def __init__(self, egress: Egress, provider: ProviderConnection) -> None:
        self._egress, self._provider = egress, provider
        self._idle: deque[Http1Connection] = deque()  # the one that was used last at the end
        self._is_closed = False

    def match(self, provider: ProviderConnection) -> bool:
        """Return whether the connections are still usable. They are not if the provider's configuration has changed."""
        own = self._provider
        return (own.version, own.base_url, own.timeouts) == (provider.version, provider.base_url, provider.timeouts)

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> AsyncIterator[ProviderResponse]:
        """Send a request and yield its response. Raise `ProviderError` if the request fails.

        The connection is kept open if the body was read to its end, and closed otherwise.
        """
        connection: Http1Connection | None = None
        response: ProviderResponse | None = None
        target: Destination | None = None
        try:
            target = self._egress.check_url(url, self._policy)
            connection = await self._take(target)
            sent = _raw_headers(target, headers, content)
            response = ProviderResponse(await connection.send(method, target.url.raw_path, sent, content), connection)
            self._egress.count(SINK, "answered", target.host)
            yield response
        except Exception as error:
            outcome, converted = _convert_error(error, self._provider)
            if response is None:
                self._egress.count(SINK, outcome, host_and_port(url) if target is None else target.host)
            if converted is None:
                raise
            raise converted from error
        finally:
            if connection is not None:
                await self._give_back(connection)

    @functools.cached_property
    def _policy(self) -> Policy:
        """Return the egress policy.

        The policy allows requests to an address that the operator configured, even a private address.
        """
        if not self._provider.operator:
            return Policy()
        base = read_url(self._provider.base_url or "")
        return Policy(operator=frozenset({(base.host, base.port)}))

    async def _take(self, target: Destination) -> Http1Connection:
        """Return the most recently used idle connection, which is most likely still open, or else a new connection."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable(IDLE_SECONDS):
                return connection
            await connection.close()
        return await self._connect(target)

    async def _connect(self, target: Destination) -> Http1Connection:
        from corral_plugins.llm.providers.asyncio_network import AsyncioNetwork
        from corral_plugins.llm.providers.http1 import Http1Connection

        seconds = self._provider.timeouts.connect_seconds
        network = self._egress.network(self._policy, AsyncioNetwork())
        stream = await network.connect_tcp(target.host, target.port, timeout=seconds)
        if target.url.scheme == "https":
            context = self._egress.tls_context()
            context.set_alpn_protocols(["http/1.1"])
            stream = await stream.start_tls(context, server_hostname=target.host, timeout=seconds)
        return Http1Connection(stream)

    async def _give_back(self, connection: Http1Connection) -> None:
        """Keep the connection if it can serve another request.

        Also close the oldest connection if it has been idle for too long.
        """
        if self._is_closed or len(self._idle) >= MAX_IDLE or not connection.finish():
            await connection.close()
            return
        self._idle.append(connection)
        if not self._idle[0].is_usable(IDLE_SECONDS):
            await self._idle.popleft().close()

    async def close(self) -> None:
        """Close the idle connections. Connections that are in use are closed after their current request."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().close()


def _raw_headers(target: Destination, headers: Mapping[str, str], content: bytes | None) -> list[tuple[bytes, bytes]]:
    given = {**HEADERS, **headers}
    sent = [(b"host", target.url.netloc), *((name.encode(), value.encode()) for name, value in given.items())]
    if content is not None:
        sent.append((b"content-length", b"%d" % len(content)))
    return sent


def _convert_error(error: Exception, provider: ProviderConnection) -> tuple[str, ProviderError | None]:
    """Return the outcome of a failed request, as the egress metrics count it, and the `ProviderError` to raise.

    The error is None if the exception was not caused by the network or the provider.
    """
    import h11
    import httpcore2

    address = host_and_port(provider.base_url)
    if isinstance(error, EgressBlocked):
        detail = f"The address {address} is blocked ({error.code}): {error.reason}"
        return "blocked", ProviderError(503, detail, code="dependency_unavailable")
    if isinstance(error, httpcore2.TimeoutException):
        what = "accept the connection" if isinstance(error, httpcore2.ConnectTimeout) else "respond"
        return "timed_out", ProviderError(504, f"{address} did not {what} in time.")
    reason = str(error).removeprefix(f"{address}: ").rstrip(".")
    if isinstance(error, h11.ProtocolError):
        reason = reason.partition(": bytearray(")[0]  # the bytes in question
        return "failed", ProviderError(502, f"{address} sent no valid HTTP response ({reason}).")
    if isinstance(error, httpcore2.NetworkError | httpcore2.ProxyError):
        return "failed", ProviderError(502, f"{address} cannot be reached: {reason}.")
    return "failed", None


def host_and_port(url: str | None) -> str:
    """Return the `host:port` of a URL, with the default port of its scheme if it contains no port."""
    parts = urlsplit(url or "")
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
