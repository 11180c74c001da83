"""The operator's proxy for outgoing connections (`[egress] proxy`)."""

from __future__ import annotations

import base64
import socket
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import httpcore2

    from corral.egress.guard import HostPort

MAX_RESPONSE_HEAD = 8 * 1024
_REFUSED = "the egress proxy did not open a tunnel"


class EgressProxy:
    """Opens tunnels with `CONNECT`.

    Corral sends the proxy the checked address instead of the name, so the proxy resolves no names.

    Connections to loopback addresses bypass the proxy, because the proxy may run on another machine.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.place: HostPort = (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
        self.is_tls = parts.scheme == "https"
        name = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        self._login = base64.b64encode(name.encode()).decode() if parts.username else None

    async def tunnel(
        self, stream: httpcore2.AsyncNetworkStream, to: HostPort, seconds: float | None
    ) -> httpcore2.AsyncNetworkStream:
        """Open a tunnel through the proxy to the host and port `to`. Raise `ProxyError` if the proxy refuses it."""
        import httpcore2

        try:
            if self.is_tls:
                context = httpcore2.default_ssl_context()
                stream = await stream.start_tls(context, server_hostname=self.place[0], timeout=seconds)
            await stream.write(self._request(to), timeout=seconds)
            head, received = b"", b"more"
            while received and b"\r\n\r\n" not in head and len(head) < MAX_RESPONSE_HEAD:
                received = await stream.read(MAX_RESPONSE_HEAD, timeout=seconds)
                head += received
            if not _is_accepted(head):
                raise httpcore2.ProxyError(_REFUSED)
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def open_socket(self, to: HostPort, seconds: float) -> socket.socket:
        """Connect to the host and port `to` through the proxy and return the blocking socket.

        Raise `OSError` if the connection fails, if the proxy refuses it, or if the URL of the proxy is an https URL.
        """
        if self.is_tls:  # sockets of `ssl` cannot run TLS inside TLS
            raise OSError("mail cannot be sent through an https:// proxy; set CORRAL_EGRESS_PROXY to an http:// URL")
        opened = socket.create_connection(self.place, seconds)
        try:
            opened.sendall(self._request(to))
            head = b""
            while not head.endswith(b"\r\n\r\n") and len(head) < MAX_RESPONSE_HEAD and (received := opened.recv(1)):
                head += received  # byte by byte: the next bytes come from the server behind the proxy
            if not _is_accepted(head):
                raise OSError(_REFUSED)
        except BaseException:
            opened.close()
            raise
        return opened

    def _request(self, to: HostPort) -> bytes:
        place = f"[{to[0]}]:{to[1]}" if ":" in to[0] else f"{to[0]}:{to[1]}"
        login = f"Proxy-Authorization: Basic {self._login}\r\n" if self._login else ""
        return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n".encode()


def _is_accepted(head: bytes) -> bool:
    """Return whether the proxy's response confirms the tunnel. `head` must include the terminating empty line."""
    status = head.split(b"\r\n", 1)[0].split()[1:2]
    return head.endswith(b"\r\n\r\n") and bool(status) and status[0].startswith(b"2")
