"""A kernel with the plugin and one that emits on demand, on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect

from corral.auth.principal import ANY_CALLER, Principal
from corral.cli import serve
from corral.cli.serve import _serve_hypercorn, listen
from corral.events.event import Event, emit
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Client, Kit

routes = Routes("/emitter", tag="Emitter")


class Happened(Event, kw_only=True):
    """Something happened."""

    event = "emitter.happened"
    number: int
    status: str = "new"


class Whispered(Event, kw_only=True):
    """Something private happened."""

    event = "emitter.whispered"
    visibility = "private"
    number: int


class NewEvents(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    count: int = 1
    first: int = 0
    status: str = "new"
    private: bool = False


@routes.post("/", needs=ANY_CALLER)
def emit_events(body: NewEvents, caller: Principal) -> dict[str, int]:
    """Emit."""
    for number in range(body.first, body.first + body.count):
        event: Event = Whispered(number=number) if body.private else Happened(number=number, status=body.status)
        emit(event, object=("thing", str(number)), owner=caller.user_id)
    return {"emitted": body.count}


class EmitterPlugin(Plugin):
    """Emits events on demand."""

    name = "emitter"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [Happened, Whispered]


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    made: Kit = await make_kit(plugins=["realtime", EmitterPlugin])
    for name in ("realtime", "emitter"):
        assert made.loaded(name).state == "active", made.loaded(name).reason
    return made


@contextlib.asynccontextmanager
async def serving(kit: Kit) -> AsyncIterator[int]:
    serve.PING_SECONDS = 0.2  # a closed socket is forgotten at its next ping
    listener, stopping = listen("127.0.0.1:0"), asyncio.Event()
    server = asyncio.create_task(_serve_hypercorn(kit.kernel.config, kit.application.app, listener, stopping))
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        await server
        listener.close()


@pytest.fixture
async def port(kit: Kit) -> AsyncIterator[int]:
    async with serving(kit) as number:
        yield number


class Ear:
    """A WebSocket client that speaks JSON."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def hear(self, seconds: float = 5.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            found: dict[str, Any] = json.loads(await self.socket.recv())
            return found

    async def hear_until(self, kind: str) -> dict[str, Any]:
        while True:
            found = await self.hear()
            if found["type"] == kind:
                return found

    async def hear_all(self) -> None:
        """Listen until the connection is closed."""
        while True:
            await self.hear()

    async def ping(self, times: int) -> None:
        for _ in range(times):
            await self.say(type="ping")
            await asyncio.sleep(0)
        await self.hear_all()

    async def closed_with(self, seconds: float = 5.0) -> int | None:
        async with asyncio.timeout(seconds):
            await self.socket.wait_closed()
        return self.socket.close_code


@contextlib.asynccontextmanager
async def listening(port: int, who: Client | None, *, query: str = "", **options: Any) -> AsyncIterator[Ear]:
    token = f"?token={who.token}" if who is not None and not query else query
    async with connect(f"ws://127.0.0.1:{port}/ws{token}", **options) as socket:
        yield Ear(socket)
