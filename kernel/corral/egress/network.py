"""The network under the HTTP client: every connection that it opens has been judged, and goes to a judged address."""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore2

from corral.egress.guard import EgressBlocked, Place, folded
from corral.egress.resolver import Unresolved

Judge = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a place, if a connection to it is allowed; else `EgressBlocked`."""

LONGEST_ANSWER = 8 * 1024


class GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves once, through the guard, and connects to what was judged. There is no other way to a socket."""

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
        """Try the addresses in turn, within `timeout` in all; TLS above this keeps the name that was asked for."""
        began = time.monotonic()
        try:
            addresses = await self._judge(host.strip("[]"), port)
        except Unresolved as error:
            raise httpcore2.ConnectError(str(error)) from None
        failure: Exception = httpcore2.ConnectTimeout("the time was over after the name was resolved")
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
        """Refused: nobody outside lives behind one."""
        raise EgressBlocked("egress.address", "Unix sockets are not reached this way.")

    async def sleep(self, seconds: float) -> None:
        """As httpcore asks for between its own retries, of which there are none."""
        await self._tcp.sleep(seconds)

    async def _open(
        self, address: str, port: int, seconds: float | None, options: Iterable[httpcore2.SOCKET_OPTION] | None
    ) -> httpcore2.AsyncNetworkStream:
        proxy = self._proxy
        if proxy is not None and not folded(address).is_loopback:  # the proxy's loopback is not ours
            stream = await self._tcp.connect_tcp(*proxy.place, timeout=seconds, socket_options=options)
            return await proxy.tunnel(stream, (address, port), seconds)
        stream = await self._tcp.connect_tcp(address, port, timeout=seconds, socket_options=options)
        peer = stream.get_extra_info("server_addr")
        if peer is None or folded(str(peer[0])) != folded(address) or peer[1] != port:
            await stream.aclose()
            raise EgressBlocked("egress.address", "The connection led to another address than the one that was judged.")
        return stream


class Proxy:
    """The operator's proxy. It is told the judged address, never the name, so it has nothing to resolve."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.place: Place = (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
        self.tls = parts.scheme == "https"
        name = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        self._login = base64.b64encode(name.encode()).decode() if parts.username else None

    def request(self, to: Place) -> bytes:
        """What asks for a tunnel to a place."""
        place = f"[{to[0]}]:{to[1]}" if ":" in to[0] else f"{to[0]}:{to[1]}"
        login = f"Proxy-Authorization: Basic {self._login}\r\n" if self._login else ""
        return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n".encode()

    @staticmethod
    def has_opened(head: bytes) -> bool:
        """Whether the whole answer, up to the empty line, says that there is a tunnel now."""
        status = head.split(b"\r\n", 1)[0].split()[1:2]
        return head.endswith(b"\r\n\r\n") and bool(status) and status[0].startswith(b"2")

    async def tunnel(
        self, stream: httpcore2.AsyncNetworkStream, to: Place, seconds: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """Ask for a tunnel over a connection to the proxy; `ProxyError` when it says no."""
        try:
            if self.tls:
                context = httpcore2.default_ssl_context()
                stream = await stream.start_tls(context, server_hostname=self.place[0], timeout=seconds)
            await stream.write(self.request(to), timeout=seconds)
            head = b""
            while b"\r\n\r\n" not in head and len(head) < LONGEST_ANSWER:
                read = await stream.read(LONGEST_ANSWER, timeout=seconds)
                if not read:
                    break
                head += read
            if not self.has_opened(head):
                raise httpcore2.ProxyError("the egress proxy did not open a tunnel")
        except BaseException:
            await stream.aclose()
            raise
        return stream
