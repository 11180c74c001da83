"""The service `Egress`: HTTP clients whose connections all pass the egress guard, and checks of URLs and addresses."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from corral.config.model import Config
from corral.egress.guard import Destination, EgressBlocked, EgressGuard, HostPort, Policy, Profile, read_host, read_url
from corral.egress.resolver import Resolver, Unresolved, of_this_machine, resolve
from corral.errors import Invalid

if TYPE_CHECKING:
    import ssl
    from http.cookiejar import CookieJar

    import httpx2

    from corral.egress.network import Proxy

log = logging.getLogger("corral.egress")

MIB = 1024 * 1024
UNRESOLVED = "unresolved_host"
REPORT_SECONDS, MAX_REPORTED = 60.0, 1000


class Verdict(NamedTuple):
    """The result of a check. `reason` is an `egress.*` code or `unresolved_host`. Show `addresses` to admins only."""

    allowed: bool
    reason: str | None
    addresses: tuple[str, ...]


class Egress:
    """Creates clients for all outgoing connections.

    `requests` counts requests by sink and outcome. Tests may replace `resolve`.
    """

    def __init__(self, config: Config, resolve: Resolver = resolve) -> None:
        self.guard = EgressGuard(config.egress.allow)
        self.resolve = resolve
        self.requests: Counter[tuple[str, str]] = Counter()
        self.proxy = _without_login(config.egress.proxy)
        self._proxy = config.egress.proxy
        self._context: ssl.SSLContext | None = None
        self._reported: dict[tuple[str, str], float] = {}
        self.on_refusal: Callable[[str, str], None] = lambda sink, host: None  # once per sink, host and minute
        self.register_server(config.server.bind)

    @property
    def listeners(self) -> frozenset[HostPort]:
        """The addresses on which Corral itself listens."""
        return frozenset(self.guard.listeners)

    def client(
        self,
        sink: str,
        *,
        profile: Profile = "public",
        operator: Iterable[str] = (),
        child: HostPort | None = None,
        connect_seconds: float = 5.0,
        total_seconds: float | None = 15.0,
        read_seconds: float | None = None,
        max_bytes: int | None = MIB,
        per_host: int = 5,
    ) -> httpx2.AsyncClient:
        """Return a pooled client for a sink. The caller must close it. A refused address raises `EgressBlocked`.

        `operator` lists `host:port` entries from the configuration, which may be private. `child` is the address of a
        registered child process; the client can then reach only this address. `total_seconds` limits a call from its
        start to the end of the response, `read_seconds` each pause within it. A response is read up to `max_bytes`
        after decompression; `corral.egress.transport.truncated` returns whether it was longer.
        """
        import httpx2

        from corral.egress.network import GuardedNetwork
        from corral.egress.transport import GuardedTransport

        policy = Policy(profile, frozenset(map(_place, operator)), child)
        proxy = self.tunnel() if child is None else None
        network = GuardedNetwork(lambda host, port: self.addresses(host, port, policy), proxy)
        transport = GuardedTransport(
            network,
            self.tls_context(),
            judge=lambda url: self._target(url, policy),
            total_seconds=total_seconds,
            max_bytes=max_bytes,
            per_host=per_host,
            note=lambda outcome, host: self.note(sink, outcome, host),
        )
        timeout = httpx2.Timeout(read_seconds, connect=connect_seconds)
        return httpx2.AsyncClient(transport=transport, timeout=timeout, trust_env=False, cookies=_no_cookies())

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context, which verifies certificates with the machine's trust store."""
        import httpcore2

        self._context = self._context or httpcore2.default_ssl_context()
        return self._context

    def tunnel(self) -> Proxy | None:
        """Return the proxy for all connections to other machines, or None if the operator has not configured one."""
        from corral.egress.network import Proxy

        return Proxy(self._proxy) if self._proxy else None

    def _target(self, url: str | httpx2.URL, policy: Policy) -> Destination:
        """Parse the URL and apply the checks that are possible before its host is resolved."""
        target = read_url(url)
        self.guard.check_place(target.host, target.port, policy)
        return target

    async def addresses(self, host: str, port: int, policy: Policy) -> list[str]:
        """Return the allowed addresses in connection order.

        Raises `EgressBlocked`, or `Unresolved` if there is no address.
        """
        host = read_host(host)
        is_open = self.guard.check_place(host, port, policy)
        found = await self.resolve(host, port)
        if policy.child is None:
            self.guard.check_listeners(port, found, of_this_machine(found))
        if not is_open:
            self.guard.check_addresses(host, port, found, policy)
        return found

    async def judge(
        self, url: str | None = None, *, host: str = "", port: int = 0, profile: Profile = "public"
    ) -> Verdict:
        """Check whether a URL, or a host and port, is allowed. Resolves the name, but does not connect."""
        try:
            if url is not None:
                _, host, port = read_url(url)
            return Verdict(True, None, tuple(await self.addresses(host, port, Policy(profile))))
        except EgressBlocked as blocked:
            return Verdict(False, blocked.code, await self._known(host, port))
        except Unresolved:
            return Verdict(False, UNRESOLVED, ())

    async def at_save(self, url: str, profile: Profile = "public", pointer: str = "/base_url") -> list[str]:
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

    def register_listener(self, host: str, port: int) -> None:
        """Deny connections to an address on which Corral itself listens."""
        self.guard.listeners.add((host, port))

    def register_server(self, bind: str, address: str = "") -> None:
        """Deny connections to Corral's own server at `bind`.

        If `bind` has no port, use the port of the URL `address`.
        """
        place = urlsplit(f"//{bind}")
        port = place.port or urlsplit(address).port
        if place.hostname and port:
            self.register_listener(place.hostname, port)

    def register_child(self, host: str, port: int) -> None:
        """Allow `client(child=…)` to reach the child process that listens on exactly this address."""
        self.guard.children.add((host, port))

    def forget_child(self, host: str, port: int) -> None:
        """Remove the address of a child process that has exited."""
        self.guard.children.discard((host, port))

    async def _known(self, host: str, port: int) -> tuple[str, ...]:
        try:
            return tuple(await self.resolve(read_host(host), port)) if host else ()
        except (Unresolved, EgressBlocked):
            return ()

    def note(self, sink: str, outcome: str, host: str) -> None:
        """Count a request. Log and report at most one refused request per sink, host and minute."""
        self.requests[sink, outcome] += 1
        now = time.monotonic()
        if outcome != "blocked" or now - self._reported.get((sink, host), -REPORT_SECONDS) < REPORT_SECONDS:
            return
        if len(self._reported) >= MAX_REPORTED:
            self._reported.clear()
        self._reported[sink, host] = now
        log.warning("outgoing connection refused", extra={"sink": sink, "host": host[:253]})
        self.on_refusal(sink, host[:253])


def _without_login(url: str | None) -> str | None:
    """Return the URL of the proxy without its credentials."""
    return url and re.sub(r"://[^/]*@", "://", url)


def _place(text: str) -> HostPort:
    """Parse `host:port`. Raises `ValueError`."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port is None:
        raise ValueError(f"{text!r} is not host:port")
    return read_host(parts.hostname), parts.port


def _no_cookies() -> CookieJar:
    """Return a cookie jar that stores nothing, so that no cookie is sent with a later request."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))
