"""The service `Egress`: HTTP clients whose every connection the guard has judged, and its word on an address."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from corral.config.model import Config
from corral.egress.guard import EgressBlocked, Guard, Place, Policy, Profile, Target, read_host, read_url
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
SAMPLE_SECONDS, MOST_SAMPLED = 60.0, 1000


class Verdict(NamedTuple):
    """What the guard says of an address; `reason` is an `egress.*` code or `unresolved_host`. `addresses` are for
    admins only.
    """

    allowed: bool
    reason: str | None
    addresses: tuple[str, ...]


class Egress:
    """Where Corral connects to. `resolve` may be replaced in tests; `requests` counts by sink and outcome."""

    def __init__(self, config: Config, resolve: Resolver = resolve) -> None:
        self.guard = Guard(config.egress.allow)
        self.resolve = resolve
        self.requests: Counter[tuple[str, str]] = Counter()
        self.proxy = _without_login(config.egress.proxy)
        self._proxy = config.egress.proxy
        self._context: ssl.SSLContext | None = None
        self._told: dict[tuple[str, str], float] = {}
        self.on_refusal: Callable[[str, str], None] = lambda sink, host: None  # one a sink and host a minute
        self.register_server(config.server.bind)

    @property
    def listeners(self) -> frozenset[Place]:
        """Where Corral itself listens."""
        return frozenset(self.guard.listeners)

    def client(
        self,
        sink: str,
        *,
        profile: Profile = "public",
        operator: Iterable[str] = (),
        child: Place | None = None,
        connect_seconds: float = 5.0,
        total_seconds: float | None = 15.0,
        read_seconds: float | None = None,
        max_bytes: int | None = MIB,
        per_host: int = 5,
    ) -> httpx2.AsyncClient:
        """A pooled client for a sink; the caller closes it. A refused address raises `EgressBlocked`.

        `operator`: `host:port` of addresses from the environment or corral.toml, which may be private. `child`: the
        address of a registered child process; the client then reaches nothing else. `total_seconds` bounds a call from
        its start to the end of its answer, `read_seconds` the silence within. An answer is read up to `max_bytes`,
        counted decompressed; `corral.egress.transport.truncated` tells whether it was longer.
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
        """How certificates are verified, by whom the machine trusts; there is no switch."""
        import httpcore2

        self._context = self._context or httpcore2.default_ssl_context()
        return self._context

    def tunnel(self) -> Proxy | None:
        """The operator's proxy, through which every connection to another machine goes; None: there is none."""
        from corral.egress.network import Proxy

        return Proxy(self._proxy) if self._proxy else None

    def _target(self, url: str | httpx2.URL, policy: Policy) -> Target:
        """What of a URL can be judged before its host is resolved."""
        target = read_url(url)
        self.guard.check_place(target.host, target.port, policy)
        return target

    async def addresses(self, host: str, port: int, policy: Policy) -> list[str]:
        """The addresses to connect to, in order; raises `EgressBlocked`, or `Unresolved` when there is none."""
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
        """Whether a URL, or a host and port, may be connected to now; resolves, never connects."""
        try:
            if url is not None:
                _, host, port = read_url(url)
            return Verdict(True, None, tuple(await self.addresses(host, port, Policy(profile))))
        except EgressBlocked as blocked:
            return Verdict(False, blocked.code, await self._known(host, port))
        except Unresolved:
            return Verdict(False, UNRESOLVED, ())

    async def at_save(self, url: str, profile: Profile = "public", pointer: str = "/base_url") -> list[str]:
        """Judge a URL that is about to be stored: its warnings (`unresolved_host`), or `Invalid` (`url_blocked`)."""
        try:
            _, host, port = read_url(url)
            await self.addresses(host, port, Policy(profile))
        except EgressBlocked as blocked:
            raise Invalid.at(pointer, blocked.code, blocked.reason, problem="url_blocked") from None
        except Unresolved:
            return [UNRESOLVED]
        return []

    def register_listener(self, host: str, port: int) -> None:
        """Corral itself listens there: nobody is led there from outside."""
        self.guard.listeners.add((host, port))

    def register_server(self, bind: str, address: str = "") -> None:
        """Corral's server is bound to `bind`; `address` is its URL, which has the port if that was left open."""
        place = urlsplit(f"//{bind}")
        port = place.port or urlsplit(address).port
        if place.hostname and port:
            self.register_listener(place.hostname, port)

    def register_child(self, host: str, port: int) -> None:
        """A child process of a plugin listens at this exact address; only `client(child=…)` reaches it."""
        self.guard.children.add((host, port))

    def forget_child(self, host: str, port: int) -> None:
        """The child process has ended."""
        self.guard.children.discard((host, port))

    async def _known(self, host: str, port: int) -> tuple[str, ...]:
        try:
            return tuple(await self.resolve(read_host(host), port)) if host else ()
        except (Unresolved, EgressBlocked):
            return ()

    def note(self, sink: str, outcome: str, host: str) -> None:
        """Count a request; of refused ones, tell of one a sink and host a minute."""
        self.requests[sink, outcome] += 1
        now = time.monotonic()
        if outcome != "blocked" or now - self._told.get((sink, host), -SAMPLE_SECONDS) < SAMPLE_SECONDS:
            return
        if len(self._told) >= MOST_SAMPLED:
            self._told.clear()
        self._told[sink, host] = now
        log.warning("a connection was refused", extra={"sink": sink, "host": host[:253]})
        self.on_refusal(sink, host[:253])


def _without_login(url: str | None) -> str | None:
    """The proxy as it may be shown."""
    return url and re.sub(r"://[^/]*@", "://", url)


def _place(text: str) -> Place:
    """`host:port` of an address that the operator configured."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port is None:
        raise ValueError(f"{text!r} is not host:port")
    return read_host(parts.hostname), parts.port


def _no_cookies() -> CookieJar:
    """A jar that keeps nothing: what one receiver sets is not sent to the next call."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))
