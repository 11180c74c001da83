"""A kernel that really serves, a plugin that emits on demand, and a client that speaks JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Literal

import httpx2
import msgspec
import pytest
from tests.limits import within
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from corral.auth.principal import ANY_CALLER, Principal
from corral.events.event import Event, emit
from corral.events.log import EventRow, last_seq
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Client, Kit
from corral.testing.server import serving
from corral_plugins.realtime.service.hub import ViewerHub

routes = Routes("/emitter", tag="Emitter")


class Happened(Event, kw_only=True):
    """Something happened."""

    event = "emitter.happened"
    number: int
    status: str = "new"
    text: str = ""


class Whispered(Event, kw_only=True):
    """Something private happened."""

    event = "emitter.whispered"
    visibility = "private"
    number: int


class Guarded(Event, kw_only=True):
    """Something for admins happened."""

    event = "emitter.guarded"
    visibility = "admin"
    number: int


class NewEvents(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`count` events, numbered from `first`."""

    count: int = 1
    first: int = 0
    status: str = "new"
    kind: Literal["happened", "whispered", "guarded"] = "happened"
    size: int = 0


@routes.post("/", needs=ANY_CALLER)
def emit_events(body: NewEvents, caller: Principal) -> dict[str, int]:
    """Emit events."""
    for number in range(body.first, body.first + body.count):
        made: dict[str, Event] = {
            "happened": Happened(number=number, status=body.status, text="x" * body.size),
            "whispered": Whispered(number=number),
            "guarded": Guarded(number=number),
        }
        emit(made[body.kind], object=("thing", str(number)), owner=caller.user_id)
    return {"emitted": body.count}


class EmitterPlugin(Plugin):
    """Emits events on demand."""

    name = "emitter"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [Happened, Whispered, Guarded]


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    made: Kit = await make_kit(plugins=["realtime", "admin", EmitterPlugin])
    for name in ("realtime", "admin", "emitter"):
        assert made.loaded(name).state == "active", made.loaded(name).reason
    return made


def hub_of(kit: Kit) -> ViewerHub:
    return kit.kernel.container.get(ViewerHub)


async def settle(kit: Kit) -> int:
    """Wait until the feed has handed on all that is committed; the last `seq`."""
    hub = hub_of(kit)
    async with asyncio.timeout(60):
        while hub.position < (last := await kit.kernel.database.work(_last, read=True)):  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.01)
    return last


def _last() -> int:
    unnumbered = EventRow.select().where(EventRow.seq.is_null()).exists()
    return 2**60 if unnumbered else last_seq()


@pytest.fixture(params=["uvicorn", "hypercorn"])
async def port(kit: Kit, request: pytest.FixtureRequest) -> AsyncIterator[int]:
    async with serving(kit, request.param) as number:
        yield number


class Ear:
    """A WebSocket client that speaks JSON."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, kind: str, **message: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **message}))

    async def hear(self, seconds: float = 60.0) -> dict[str, Any]:
        """The next frame."""
        async with within(seconds):
            found: dict[str, Any] = json.loads(await self.socket.recv())
            return found

    async def ask(self, kind: str, **message: Any) -> dict[str, Any]:
        """Say, and hear one frame."""
        await self.say(kind, **message)
        return await self.hear()

    async def numbers(self, count: int, seconds: float = 60.0) -> list[int]:
        """The numbers of the next `count` events."""
        return [(await self.hear(seconds))["data"]["number"] for _ in range(count)]

    async def rest(self) -> AsyncIterator[dict[str, Any]]:
        """Whatever comes until the close."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                yield await self.hear()

    async def silence(self, seconds: float = 0.4) -> None:
        """Nothing comes."""
        with pytest.raises(TimeoutError):
            raise AssertionError(await self.hear(seconds))

    async def closed(self, seconds: float = 60.0) -> int | None:
        """The code of the close."""
        async with within(seconds):
            await self.socket.wait_closed()
        return self.socket.close_code


@contextlib.asynccontextmanager
async def ear(port: int, who: Client | None, query: str = "", path: str = "/ws", **options: Any) -> AsyncIterator[Ear]:
    """A socket, signed in by `?token=` unless the query says something else."""
    query = query or (f"?token={who.token}" if who is not None else "")
    async with connect(f"ws://127.0.0.1:{port}{path}{query}", proxy=None, compression=None, **options) as socket:
        yield Ear(socket)


class Sse:
    """The events of a stream: `(id, name, data)`."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._lines = answer.aiter_lines().__aiter__()
        self.comments, self.retry = 0, ""

    async def begin(self) -> None:
        async with asyncio.timeout(60):
            assert await anext(self._lines) == ": connected"
            assert await anext(self._lines) == ""

    async def event(self, seconds: float = 60.0) -> tuple[str | None, str, Any]:
        async with within(seconds):
            return await anext(self)

    def __aiter__(self) -> Sse:
        return self

    async def __anext__(self) -> tuple[str | None, str, Any]:
        found: dict[str, str] = {}
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, text = line.partition(": ")
                found[name] = text
            elif found:  # many parsers deliver every block with a field, also one without data
                self.retry = found.pop("retry", self.retry)
                return found.get("id"), found["event"], json.loads(found["data"])
        raise StopAsyncIteration


@contextlib.asynccontextmanager
async def sse(port: int, who: Client, query: str = "", last: str | None = None) -> AsyncIterator[Sse]:
    headers = {"Authorization": f"Bearer {who.token}", **({"Last-Event-ID": last} if last else {})}
    url = f"http://127.0.0.1:{port}/api/v1/events/stream?{query}"
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=20) as http,
        http.stream("GET", url, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        yield Sse(answer)
