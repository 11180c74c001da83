"""The `Egress` service: HTTP clients that connect only through the egress guard, and checks of URLs and addresses."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from corral.config.model import Config
from corral.egress.guard import (
    Destination,
    EgressBlocked,
    EgressGuard,
    Policy,
    Profile,
    canonical_address,
    check_peer,
    read_host,
    read_url,
)
from corral.egress.resolver import Resolver, Unresolved, is_local, resolve
from corral.errors import Invalid

if TYPE_CHECKING:
    import ssl
    from http.cookiejar import CookieJar

    import httpcore2
    import httpx2

    from corral.egress.transport import GuardedNetwork
    from corral.egress.upstream_proxy import EgressProxy

MIB = 1024 * 1024
UNRESOLVED = "unresolved_host"
PUBLIC = Policy()


class Egress:
    """The egress guard, through which Corral makes all connections to user-supplied addresses."""

    def __init__(self, config: Config, resolve: Resolver = resolve) -> None:
        self.guard = EgressGuard(config.egress.allow)
        self.resolve = resolve
        self.requests: Counter[tuple[str, str]] = Counter()
        self._proxy_url = config.egress.proxy
        self._context: ssl.SSLContext | None = None
        self.on_refusal: Callable[[str, str], None] = lambda sink, host: None
        self.deny_own_server(config.server.bind)

    def client(
        self,
        sink: str,
        *,
        policy: Policy = PUBLIC,
        connect_seconds: float = 5.0,
        total_seconds: float | None = 15.0,
        max_bytes: int | None = MIB,
        per_host: int = 5,
    ) -> httpx2.AsyncClient:
        """Return a pooled client. `sink` names the feature that opens the connections.

        The caller must close the client. By default, the client may connect to public addresses; with
        `Policy(child=…)`, it may connect only to a registered child process. `EgressBlocked` is raised if an address is
        refused. `total_seconds` limits the time from the start of a request to the end of its response. At most
        `max_bytes` of a response are read, counted after decompression; `corral.egress.transport.is_truncated` returns
        whether the response was longer.
        """
        import httpx2

        from corral.egress.transport import GuardedTransport

        transport = GuardedTransport(self, sink, policy, total_seconds, max_bytes, per_host)
        timeout = httpx2.Timeout(None, connect=connect_seconds)
        return httpx2.AsyncClient(transport=transport, timeout=timeout, trust_env=False, cookies=_no_cookies())

    def network(self, policy: Policy, tcp: httpcore2.AsyncNetworkBackend | None = None) -> GuardedNetwork:
        """Return the `httpcore2` network backend that connects only to destinations that the policy allows.

        `tcp` opens the connections to the addresses that the guard has checked.
        """
        from httpcore2 import AnyIOBackend

        from corral.egress.transport import GuardedNetwork

        proxy = self.proxy() if policy.child is None else None
        return GuardedNetwork(lambda host, port: self.addresses(host, port, policy), proxy, tcp or AnyIOBackend())

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context, which verifies certificates with the machine's trust store."""
        import httpcore2

        self._context = self._context or httpcore2.default_ssl_context()
        return self._context

    def proxy(self) -> EgressProxy | None:
        """Return the proxy for all connections to other machines, or None if the operator has not configured one."""
        from corral.egress.upstream_proxy import EgressProxy

        return EgressProxy(self._proxy_url) if self._proxy_url else None

    @property
    def proxy_address(self) -> str | None:
        """The URL of the proxy without its credentials."""
        return self._proxy_url and re.sub(r"://[^/]*@", "://", self._proxy_url)

    def check_url(self, url: str | httpx2.URL, policy: Policy) -> Destination:
        """Parse the URL and apply the checks that are possible before its host is resolved.

        Raise `EgressBlocked` if a check fails.
        """
        target = read_url(str(url))
        self.guard.check_destination(target.host, target.port, policy)
        return target

    async def addresses(self, host: str, port: int, policy: Policy) -> list[str]:
        """Return the allowed addresses of a host, in the order in which they should be tried.

        Raise `EgressBlocked` if the egress guard refuses the host or one of its addresses, and `Unresolved` if the host
        has no address.
        """
        host = read_host(host)
        is_open = self.guard.check_destination(host, port, policy)
        found = await self.resolve(host, port)
        if policy.child is None:
            self.guard.check_listeners(port, found, is_local)
        if not is_open:
            self.guard.check_addresses(host, port, found, policy)
        return found

    async def check_saved_url(self, url: str, profile: Profile = "public", pointer: str = "/base_url") -> list[str]:
        """Check a URL before it is stored.

        Returns warnings (`unresolved_host`), or raises `Invalid` (`url_blocked`).
        """
        try:
            _, host, port = read_url(url)
            await self.addresses(host, port, Policy(profile))
        except EgressBlocked as blocked:
            raise Invalid.at(pointer, blocked.code, blocked.reason, problem="url_blocked") from None
        except Unresolved:
            return [UNRESOLVED]
        return []

    def open_socket(self, addresses: Sequence[str], port: int, seconds: float) -> socket.socket:
        """Connect to the first of the allowed `addresses` that answers, and return a blocking socket.

        Use this method for libraries that need a socket, such as SMTP libraries. `addresses` must be a result of the
        method `addresses`. Raise `OSError` if no address answers, or `EgressBlocked` if the peer does not have the
        address that was checked.
        """
        proxy, failure = self.proxy(), OSError("the host name does not resolve to an address")
        for address in addresses:
            try:
                if proxy is not None and not canonical_address(address).is_loopback:
                    return proxy.open_socket((address, port), seconds)
                opened = socket.create_connection((address, port), seconds)
            except OSError as error:
                failure = error
                continue
            try:
                check_peer(opened.getpeername(), address)
            except BaseException:
                opened.close()
                raise
            return opened
        raise failure

    def deny_own_server(self, bind: str, address: str = "") -> None:
        """Deny connections to Corral's own server, which listens on `bind`.

        If `bind` has no port, the port is taken from the URL `address`.
        """
        place = urlsplit(f"//{bind}")
        port = place.port or urlsplit(address).port
        if place.hostname and port:
            self.guard.listeners.add((place.hostname, port))

    def register_child(self, host: str, port: int) -> None:
        """Allow clients with `Policy(child=…)` to connect to the child process that listens on exactly this address."""
        self.guard.children.add((host, port))

    def unregister_child(self, host: str, port: int) -> None:
        """Remove the address of a child process that has exited."""
        self.guard.children.discard((host, port))

    def count(self, sink: str, outcome: str, host: str) -> None:
        """Count a request by sink and outcome. If the guard blocked the request, call `on_refusal`."""
        self.requests[sink, outcome] += 1
        if outcome == "blocked":
            self.on_refusal(sink, host[:253])


def _no_cookies() -> CookieJar:
    """Return a cookie jar that stores nothing, so that no cookie is sent with a later request."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))
