"""The network backend of the HTTP client. It connects only to addresses that the egress guard has allowed."""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore2

from corral.egress.guard import EgressBlocked, HostPort, canonical_address
from corral.egress.resolver import Unresolved

Judge = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the allowed addresses of a host and port, or raises `EgressBlocked`."""

MAX_RESPONSE_HEAD = 8 * 1024


class GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves each name once, through the guard, and connects only to the allowed addresses."""

    def __init__(self, judge: Judge, proxy: Proxy | None) -> None:
        self._judge, self._proxy = judge, proxy
        self._tcp = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  (httpcore2's name)
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Try the addresses in turn, within `timeout` seconds in total. TLS on top verifies the requested name."""
        began = time.monotonic()
        try:
            addresses = await self._judge(host.strip("[]"), port)
        except Unresolved as error:
            raise httpcore2.ConnectError(str(error)) from None
        failure: Exception = httpcore2.ConnectTimeout("the time ran out after the name was resolved")
        for number, address in enumerate(addresses):
            left = None if timeout is None else (timeout + began - time.monotonic()) / (len(addresses) - number)
            if left is not None and left <= 0:
                break
            try:
                return await self._open(address, port, left, socket_options)
            except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProxyError) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  (httpcore2's name)
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse the connection, because a Unix socket leads only to this machine."""
        raise EgressBlocked("egress.address", "Connections to unix sockets are not allowed.")

    async def sleep(self, seconds: float) -> None:
        """Sleep. httpcore requires this method for its retries, which are not used."""
        await self._tcp.sleep(seconds)

    async def _open(
        self, address: str, port: int, seconds: float | None, options: Iterable[httpcore2.SOCKET_OPTION] | None
    ) -> httpcore2.AsyncNetworkStream:
        proxy = self._proxy
        if proxy is not None and not canonical_address(address).is_loopback:  # the proxy's loopback is not ours
            stream = await self._tcp.connect_tcp(*proxy.place, timeout=seconds, socket_options=options)
            return await proxy.tunnel(stream, (address, port), seconds)
        stream = await self._tcp.connect_tcp(address, port, timeout=seconds, socket_options=options)
        peer = stream.get_extra_info("server_addr")
        if peer is None or canonical_address(str(peer[0])) != canonical_address(address) or peer[1] != port:
            await stream.aclose()
            raise EgressBlocked(
                "egress.address", "The connection reached another address than the one that was checked."
            )
        return stream


class Proxy:
    """The operator's proxy. It receives the checked address instead of the name, so it resolves nothing."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.place: HostPort = (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
        self.tls = parts.scheme == "https"
        name = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        self._login = base64.b64encode(name.encode()).decode() if parts.username else None

    def request(self, to: HostPort) -> bytes:
        """Return the CONNECT request for a host and port."""
        place = f"[{to[0]}]:{to[1]}" if ":" in to[0] else f"{to[0]}:{to[1]}"
        login = f"Proxy-Authorization: Basic {self._login}\r\n" if self._login else ""
        return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n".encode()

    @staticmethod
    def has_opened(head: bytes) -> bool:
        """Return whether the head of the response, including the empty line, confirms the tunnel."""
        status = head.split(b"\r\n", 1)[0].split()[1:2]
        return head.endswith(b"\r\n\r\n") and bool(status) and status[0].startswith(b"2")

    async def tunnel(
        self, stream: httpcore2.AsyncNetworkStream, to: HostPort, seconds: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """Open a tunnel over a connection to the proxy. Raises `ProxyError` if the proxy refuses."""
        try:
            if self.tls:
                context = httpcore2.default_ssl_context()
                stream = await stream.start_tls(context, server_hostname=self.place[0], timeout=seconds)
            await stream.write(self.request(to), timeout=seconds)
            head = b""
            while b"\r\n\r\n" not in head and len(head) < MAX_RESPONSE_HEAD:
                read = await stream.read(MAX_RESPONSE_HEAD, timeout=seconds)
                if not read:
                    break
                head += read
            if not self.has_opened(head):
                raise httpcore2.ProxyError("the egress proxy did not open a tunnel")
        except BaseException:
            await stream.aclose()
            raise
        return stream
