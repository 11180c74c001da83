"""WebSocket endpoints as data: who may open one and what serves it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

import msgspec

from corral.errors import Problem
from corral.http.answers import Request


class SocketConnection(Protocol):
    """An open handshake: accept or refuse it, then talk."""

    request: Request
    query: dict[str, str]

    async def accept(self) -> None:
        """Complete the handshake."""
        ...

    async def refuse(self, problem: Problem) -> None:
        """Refuse the handshake with the document of a problem."""
        ...

    def count_anonymous(self) -> None:
        """Count as if no credential had been sent, for one that is none; raises `TooMany`."""
        ...

    async def receive(self) -> str | bytes | None:
        """The next message; None when the client has gone."""
        ...

    async def send(self, text: str) -> None:
        """Send a text frame; raises `ConnectionError` when the client has gone."""
        ...

    async def close(self, code: int, reason: str = "") -> None:
        """Close with a code of RFC 6455."""
        ...


class Socket(msgspec.Struct, frozen=True):
    """`serve(connection, …services)` under `/api/v1` and at the root.

    Closing and refusing is the endpoint's own business.
    """

    path: Annotated[str, msgspec.Meta(pattern="^/")]
    serve: Callable[..., Awaitable[Any]]
    plugin: str = ""
