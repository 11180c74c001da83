"""Pooled HTTP clients of providers. Every connection passes the egress guard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from corral.egress.client import Egress
from corral.errors import Unavailable
from corral_plugins.llm.api import Connection

if TYPE_CHECKING:
    import httpx2

SINK = "llm"
CONNECTIONS = 1000  # places in the provider's queue are what limits calls
MAX_ANSWER = 64 * 1024 * 1024


class Clients:
    """One client a provider; replaced when its configuration changes, and closed when no call uses it any more."""

    def __init__(self) -> None:
        self._egress: Egress | None = None
        self._open: dict[str, _Shared] = {}

    def bind(self, egress: Egress) -> None:
        """The guard that all connections pass; nothing is called before."""
        self._egress = egress

    @contextlib.asynccontextmanager
    async def of(self, connection: Connection) -> AsyncIterator[httpx2.AsyncClient]:
        """The client of a provider."""
        key = (connection.version, connection.base_url, connection.timeouts.connect_seconds)
        shared = self._open.get(connection.name)
        if shared is None or shared.key != key:
            if shared is not None:
                await shared.retire()
            shared = self._open[connection.name] = _Shared(key, self._make(connection))
        shared.users += 1
        try:
            yield shared.client
        finally:
            shared.users -= 1
            if shared.retired:
                await shared.retire()

    async def close(self) -> None:
        """Close all."""
        while self._open:
            _, shared = self._open.popitem()
            await shared.client.aclose()

    def _make(self, connection: Connection) -> httpx2.AsyncClient:
        if self._egress is None:
            raise Unavailable("The gateway has not started yet.")
        return self._egress.client(
            SINK,
            profile="public",
            operator=(address(connection.base_url),) if connection.operator else (),
            connect_seconds=connection.timeouts.connect_seconds,
            total_seconds=None,
            max_bytes=MAX_ANSWER,
            per_host=CONNECTIONS,
        )


class _Shared:
    def __init__(self, key: tuple[Any, ...], client: httpx2.AsyncClient) -> None:
        self.key, self.client = key, client
        self.users, self.retired = 0, False

    async def retire(self) -> None:
        """Close it now, or with its last user."""
        self.retired = True
        if not self.users:
            await self.client.aclose()


def address(url: str | None) -> str:
    """`host:port` of a URL."""
    parts = urlsplit(url or "")
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def positive(value: Any) -> int | None:
    """A size that a server tells of a model; None: it tells none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
