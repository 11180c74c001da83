"""The transport of an `httpx2` client.

The transport checks the URL of each request, connects only to addresses that the egress guard allows, and limits the
size and duration of responses.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import httpcore2
import httpx2

from corral.egress.guard import Destination, EgressBlocked, Policy, canonical_address, check_peer
from corral.egress.resolver import Unresolved
from corral.egress.upstream_proxy import EgressProxy

if TYPE_CHECKING:
    from corral.egress.client import Egress

Addresses = Callable[[str, int], Awaitable[Sequence[str]]]
"""A function that returns the allowed addresses of a host and port, or raises `EgressBlocked` or `Unresolved`."""

TRUNCATED = "corral.truncated"
GZIP_WINDOW = 31  # window bits with which zlib accepts the gzip format
STEP = 64 * 1024  # decompressed bytes per step


def is_truncated(response: httpx2.Response) -> bool:
    """Return whether the response was cut off at the client's size limit.

    Call this function after reading the response.
    """
    return bool(response.extensions.get(TRUNCATED))


class GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves each name once, checks its addresses with the egress guard, and connects only to allowed addresses."""

    def __init__(self, addresses: Addresses, proxy: EgressProxy | None, tcp: httpcore2.AsyncNetworkBackend) -> None:
        self._addresses, self._proxy, self._tcp = addresses, proxy, tcp

    async def connect_tcp(self, host: str, port: int, *_: Any, **options: Any) -> httpcore2.AsyncNetworkStream:
        """Try the allowed addresses of the host in order. The option `timeout` limits the total time, in seconds.

        TLS verifies the certificate for the requested name, although the connection is made to an address. Other
        httpcore2 options are ignored.
        """
        timeout: float | None = options.get("timeout")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            addresses = await self._addresses(host.strip("[]"), port)
        except Unresolved as error:
            raise httpcore2.ConnectError(str(error)) from None
        failure: Exception = httpcore2.ConnectError(f"{host} does not resolve to an address")
        for number, address in enumerate(addresses):
            seconds = None if deadline is None else (deadline - time.monotonic()) / (len(addresses) - number)
            try:
                return await self._connect(address, port, seconds)
            except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProxyError) as error:
                failure = error
        errno = getattr(getattr(failure.__cause__, "__cause__", None), "errno", None)  # of the operating system
        reason = os.strerror(errno) if errno else str(failure) or "no answer in time"
        raise type(failure)(f"{host}:{port}: {reason}") from failure

    async def _connect(self, address: str, port: int, seconds: float | None) -> httpcore2.AsyncNetworkStream:
        proxy = self._proxy
        if proxy is not None and not canonical_address(address).is_loopback:
            stream = await self._tcp.connect_tcp(*proxy.place, timeout=seconds)
            return await proxy.tunnel(stream, (address, port), seconds)
        stream = await self._tcp.connect_tcp(address, port, timeout=seconds)
        try:
            check_peer(stream.get_extra_info("server_addr"), address)
        except EgressBlocked:
            await stream.aclose()
            raise
        return stream


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Checks each URL, and limits the connections per host and the duration and decompressed size of each response."""

    def __init__(
        self, egress: Egress, sink: str, policy: Policy, seconds: float | None, max_bytes: int | None, per_host: int
    ) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=4 * per_host, keepalive_expiry=15.0)
        self._inner = httpx2.AsyncHTTPTransport(verify=egress.tls_context(), trust_env=False, limits=limits)
        pool: Any = self._inner._pool
        if not isinstance(pool._network_backend, httpcore2.AsyncNetworkBackend):  # otherwise nothing would be guarded
            raise RuntimeError("the network backend of this httpx2 version cannot be replaced; install a supported one")
        pool._network_backend = egress.network(policy)
        self._egress, self._sink, self._policy = egress, sink, policy
        self._seconds, self._max_bytes, self._per_host = seconds, max_bytes, per_host
        self._slots = WeakValueDictionary[str, asyncio.Semaphore]()  # by host, kept only while a request uses them

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Check, send and count a request.

        Raise `EgressBlocked` if the egress guard refuses the request, or an httpx2 exception if the request fails.
        """
        host = request.url.host
        deadline = None if self._seconds is None else asyncio.get_running_loop().time() + self._seconds
        try:
            target = self._egress.check_url(request.url, self._policy)
            host = target.host
            _send_as_checked(request, target)
            return await self._send(request, host, deadline)
        except EgressBlocked:
            self._egress.count(self._sink, "blocked", host)
            raise
        except (httpx2.TimeoutException, TimeoutError) as error:
            self._egress.count(self._sink, "timed_out", host)
            raise error if isinstance(error, httpx2.TimeoutException) else _too_slow() from None
        except httpx2.HTTPError:
            self._egress.count(self._sink, "failed", host)
            raise

    async def _send(self, request: httpx2.Request, host: str, deadline: float | None) -> httpx2.Response:
        slots = self._slots.setdefault(host, asyncio.Semaphore(self._per_host))
        async with asyncio.timeout_at(deadline):
            await slots.acquire()
            try:
                response = await self._inner.handle_async_request(request)
            except BaseException:
                slots.release()
                raise
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        body = _Body(response, coding == "gzip", self._max_bytes, deadline, slots)
        if coding not in ("gzip", "identity"):
            await body.aclose()
            raise httpx2.DecodingError("the response has a content encoding that was not requested", request=request)
        headers = response.headers.copy()
        if coding == "gzip":
            headers.pop("content-encoding")
            headers.pop("content-length", None)
        self._egress.count(self._sink, "answered", host)
        shown = httpx2.Response(response.status_code, headers=headers, stream=body, extensions=response.extensions)
        body.extensions = shown.extensions
        return shown

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


class _Body(httpx2.AsyncByteStream):
    """A response body that is decompressed in steps of limited size.

    Reading ends at the size limit or at the deadline, and the connection is then closed.
    """

    def __init__(
        self,
        response: httpx2.Response,
        is_gzip: bool,
        cap: int | None,
        deadline: float | None,
        slots: asyncio.Semaphore,
    ) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._stream, self._cap, self._deadline, self._slots = response.stream, cap, deadline, slots
        self.extensions: dict[str, Any] = {}
        self._decoder = zlib.decompressobj(GZIP_WINDOW) if is_gzip else None
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._cap
        try:
            async for chunk in self._chunks():
                for piece in self._decoded(chunk):
                    if left is not None and len(piece) > left:
                        self.extensions[TRUNCATED] = True
                        yield piece[:left]
                        return
                    left = left if left is None else left - len(piece)
                    yield piece
        finally:
            await self.aclose()

    async def _chunks(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise _too_slow() from None
            yield chunk

    def _decoded(self, chunk: bytes) -> Iterator[bytes]:
        if self._decoder is None:
            yield chunk
            return
        try:
            piece = b"more"
            while chunk or len(piece) == STEP:  # until the input is used up and the output complete
                piece = self._decoder.decompress(chunk, STEP)
                chunk = self._decoder.unconsumed_tail
                yield piece
        except zlib.error as error:
            raise httpx2.DecodingError(str(error)) from None

    async def aclose(self) -> None:
        """Release the connection slot. If the response was not read to the end, the pool closes its connection."""
        if not self._closed:
            self._closed = True
            try:
                await self._stream.aclose()
            finally:
                self._slots.release()


def _send_as_checked(request: httpx2.Request, target: Destination) -> None:
    """Change the request so that it is sent to the URL that was checked, with this URL's host as the `Host` header."""
    request.url, request.headers["Host"] = target.url, target.url.netloc.decode("ascii")
    if request.headers.get("Accept-Encoding") != "identity":  # callers may request identity for undelayed streams
        request.headers["Accept-Encoding"] = "gzip"


def _too_slow() -> httpx2.ReadTimeout:
    return httpx2.ReadTimeout("the response was not complete in time")
