"""Each hook of the kernel by its name: what a plugin contributes takes effect."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import peewee
import pluggy
import pytest
from click.testing import CliRunner

from corral.auth.principal import PUBLIC, SIGNED_IN, Principal
from corral.cli.commands import group
from corral.database.model import Model
from corral.database.unit import current
from corral.errors import Forbidden, StartupError, Unauthorized
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.events.live_feed import Bus
from corral.events.log import LoggedEvent
from corral.http.routes import Routes, Socket, SocketConnection
from corral.jobs.job import Job, Schedule, enqueue
from corral.jobs.shared_queue import SharedJobQueue
from corral.plugin import (
    Contributions,
    HealthCheck,
    Metric,
    Plugin,
    Provide,
    Setting,
    hookimpl,
)
from corral.plugins.discovery import Found
from corral.storage.blobs import BlobStore
from corral.testing.kit import Kit, make_kernel
from corral_core.local_storage.service import LocalBlobs
from corral_core.redis.service.bus import RedisBus


def plugin(name: str, **hooks: Callable[..., Any]) -> type[Plugin]:
    """A plugin with these hooks; each takes `self`."""
    body = {hook: hookimpl(function) for hook, function in hooks.items()}
    return type(f"{name.title()}Plugin", (Plugin,), {"__doc__": "Of one test.", "name": name, **body})


async def wait_for(seen: list[Any], more: Callable[[], Any] = lambda: None) -> None:
    """Until something was seen; `more` is done again and again meanwhile."""
    end = time.monotonic() + 60
    while not seen:
        assert time.monotonic() < end
        made = more()
        if made is not None:
            await made
        await asyncio.sleep(0.05)


class Greeter:
    """A service."""

    def greet(self) -> str:
        return "hello"


class Waved(Event, kw_only=True):
    """Somebody waved."""

    event = "waves.waved"

    by: str


def greeting_routes() -> Routes:
    routes = Routes("/greeting", tag="Greeting")

    @routes.get("/", needs=PUBLIC)
    def read_greeting(greeter: Greeter) -> dict[str, str]:
        """Greet."""
        return {"text": greeter.greet()}

    return routes


def plain_routes() -> Routes:
    routes = Routes("/plain", tag="Plain")

    @routes.get("/", needs=PUBLIC)
    def read_plain() -> dict[str, str]:
        """Answer."""
        return {"plain": "yes"}

    @routes.get("/me", needs=SIGNED_IN)
    def read_me(caller: Principal) -> dict[str, str]:
        """Who calls."""
        return {"id": caller.id}

    return routes


def contributed(kit: Kit, hook: str) -> list[tuple[str, Any]]:
    return kit.kernel.container.get(Contributions).for_hook(hook)


async def test_corral_services(tmp_path: Path) -> None:
    services = plugin(
        "greeting",
        corral_services=lambda self: [Provide(Greeter, Greeter)],
        corral_routes=lambda self: [greeting_routes()],
    )
    async with make_kernel(tmp_path, plugins=[services]) as kit:
        assert (await kit.client.get("/greeting")).json() == {"text": "hello"}


async def test_corral_routes(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[plugin("plain", corral_routes=lambda self: [plain_routes()])]) as kit:
        assert (await kit.client.get("/plain/")).json() == {"plain": "yes"}
        assert "/api/v1/plain" in (await kit.client.get("/openapi.json")).json()["paths"]


async def _shout(connection: SocketConnection) -> None:
    await connection.accept()
    while (text := await connection.receive()) is not None:
        await connection.send(str(text).upper())


async def test_corral_sockets(tmp_path: Path) -> None:
    shouting = plugin("shouting", corral_sockets=lambda self: [Socket("/shout", _shout)])
    async with make_kernel(tmp_path, plugins=[shouting]) as kit:
        coming = iter(
            [
                {"type": "websocket.connect"},
                {"type": "websocket.receive", "text": "quiet"},
                {"type": "websocket.disconnect", "code": 1000},
            ]
        )
        sent: list[Any] = []
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": "/shout",
            "raw_path": b"/shout",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 50000),
            "server": ("localhost", 80),
            "subprotocols": [],
            "extensions": {},
        }

        async def receive() -> Any:
            return next(coming)

        async def send(message: Any) -> None:
            sent.append(message)

        await kit.application.app(scope, receive, send)  # type: ignore[arg-type]  # a scope of our own
        assert [message.get("text") for message in sent if message["type"] == "websocket.send"] == ["QUIET"]


def _model(table: str) -> type[Model]:
    class Thing(Model):
        name = peewee.CharField(primary_key=True)

        class Meta:
            table_name = table

    return Thing


async def test_corral_models(tmp_path: Path) -> None:
    own, foreign = _model("shelf_things"), _model("tasks_things")
    shelf = plugin("shelf", corral_models=lambda self: [own])
    thief = plugin("thief", corral_models=lambda self: [foreign])
    async with make_kernel(tmp_path, plugins=[shelf, thief]) as kit:
        assert ("shelf", own) in contributed(kit, "corral_models")
        assert "table tasks_things must begin with thief_" in (kit.loaded("thief").reason or "")


async def test_corral_events(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[plugin("waves", corral_events=lambda self: [Waved])]) as kit:
        told = {item.event: item.title for item in kit.kernel.event_types.all()}
        assert told["waves.waved"] == "Somebody waved."
        await kit.kernel.database.work(lambda: emit(Waved(by="alice"), object=("wave", "1")))
        assert [(event.type, json.loads(event.data)) for event in await kit.events()] == [
            ("waves.waved", {"by": "alice"})
        ]


async def test_corral_subscribers(tmp_path: Path) -> None:
    seen: list[str] = []

    def follow(event: LoggedEvent) -> None:
        seen.append(event.type)

    waves = plugin(
        "waves",
        corral_events=lambda self: [Waved],
        corral_subscribers=lambda self: [Subscriber("waves.follow", ("waves.*",), follow)],
    )
    async with make_kernel(tmp_path, plugins=[waves], jobs=True) as kit:
        wave = lambda: kit.kernel.database.work(lambda: emit(Waved(by="bob"), object=("wave", "1")))  # noqa: E731
        await wait_for(seen, wave)
        assert set(seen) == {"waves.waved"}


async def test_corral_jobs(tmp_path: Path) -> None:
    done: list[str] = []

    def carry(what: str) -> None:
        done.append(what)

    async with make_kernel(
        tmp_path, plugins=[plugin("porter", corral_jobs=lambda self: [Job("porter.carry", carry)])]
    ) as kit:
        await kit.kernel.database.work(lambda: enqueue("porter.carry", what="box"))
        assert await kit.run_jobs() == 1
        assert done == ["box"]


async def test_corral_schedules(tmp_path: Path) -> None:
    ticks: list[bool] = []
    clock = plugin(
        "ticking", corral_schedules=lambda self: [Schedule("ticking.tick", 60, lambda: ticks.append(bool(current())))]
    )
    async with make_kernel(tmp_path, plugins=[clock], jobs=True):
        await wait_for(ticks)
        assert ticks == [True]


async def test_corral_settings(tmp_path: Path) -> None:
    size = Setting(name="shelf.size", kind=int, default=3, title="How much fits", minimum=1, maximum=9)
    shelf = plugin("shelf", corral_settings=lambda self: [size])
    async with make_kernel(tmp_path, plugins=[shelf]) as kit:
        found = {item.setting.name: (item.setting, item.pinned_by) for item in kit.kernel.settings.all()}
        assert found["shelf.size"] == (size, None)
        assert kit.kernel.settings.get(size) == 3


class Badges:
    """Recognises badges."""

    def recognises(self, credential: str) -> bool:
        return credential.startswith("badge_")

    def authenticate(self, credential: str) -> Principal:
        return Principal(kind="user", id=credential.removeprefix("badge_"), role="viewer")


async def test_corral_authenticators(tmp_path: Path) -> None:
    badges = plugin("plain", corral_authenticators=lambda self: [Badges], corral_routes=lambda self: [plain_routes()])
    async with make_kernel(tmp_path, plugins=[badges]) as kit:
        answer = await kit.client.get("/plain/me", headers={"Authorization": "Bearer badge_7"})
        assert answer.json() == {"id": "7"}
        assert (await kit.client.get("/plain/me", headers={"Authorization": "Bearer other_7"})).status == 401
        with pytest.raises(Unauthorized):  # it cannot tell what has become of a caller
            kit.kernel.credentials.reload_principal(Badges().authenticate("badge_7"))


class Wall:
    """Lets nobody in behind /wall."""

    def check(self, client_ip: str, method: str, path: str) -> None:
        if path.startswith("/api/v1/wall"):
            raise Forbidden(f"Not {client_ip}.")


async def test_corral_gates(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[plugin("wall", corral_gates=lambda self: [Wall()])]) as kit:
        assert (await kit.client.get("/wall/behind")).code == "forbidden"  # before the route is looked up
        assert (await kit.client.get("/elsewhere")).code == "not_found"


async def test_corral_health_checks(tmp_path: Path) -> None:
    check = HealthCheck("printer", lambda: ("ok", "has paper"))
    async with make_kernel(tmp_path, plugins=[plugin("printer", corral_health_checks=lambda self: [check])]) as kit:
        told = {(name, item.name): item.check() for name, item in contributed(kit, "corral_health_checks")}
        assert told[("printer", "printer")] == ("ok", "has paper")


async def test_corral_metrics(tmp_path: Path) -> None:
    metric = Metric(
        name="shelf_things",
        help="Things by colour.",
        labels={"colour": ("red",)},
        collect=lambda: {("red",): 2.0, ("mauve",): 1.0},
    )
    async with make_kernel(tmp_path, plugins=[plugin("shelf", corral_metrics=lambda self: [metric])]) as kit:
        text = (await kit.client.get("/metrics")).body.decode()
        assert 'shelf_things{colour="red"} 2' in text
        assert 'shelf_things{colour="other"} 1' in text


def test_corral_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @click.command("wave")
    def wave() -> None:
        """Wave."""
        click.echo("waving")

    kind = plugin("waves", corral_commands=lambda self: [wave])
    monkeypatch.setattr("corral.plugins.discovery.discover", lambda config: [Found(name="waves", load=lambda: kind)])
    assert CliRunner().invoke(group, ["wave"]).output == "waving\n"
    assert "Wave." in CliRunner().invoke(group, ["--help"]).output


async def test_corral_hookspecs(tmp_path: Path) -> None:
    offered = ModuleType("offered")

    def corral_greetings() -> Iterable[str]:  # type: ignore[empty-body]
        """Words."""

    offered.corral_greetings = pluggy.HookspecMarker("corral")(corral_greetings)  # type: ignore[attr-defined]
    offered.fn = peewee.fn  # type: ignore[attr-defined]  # imported there, say: it has every attribute it is asked for
    owner = plugin("owner", corral_hookspecs=lambda self: [offered], corral_greetings=lambda self: ["hello"])
    guest = plugin("guest")
    guest.wants = ("owner",)
    guest.corral_greetings = hookimpl(optionalhook=True)(lambda self: ["hi", "hey"])  # type: ignore[attr-defined]
    async with make_kernel(tmp_path, plugins=[owner, guest]) as kit:
        assert sorted(contributed(kit, "corral_greetings")) == [("guest", "hey"), ("guest", "hi"), ("owner", "hello")]
    async with make_kernel(tmp_path, plugins=[guest]) as kit:  # the owner is absent: the hook is nobody's
        assert kit.loaded("guest").active


async def test_corral_blob_store(tmp_path: Path) -> None:
    asked: list[str] = []

    def serve(self: Any, url: str) -> BlobStore | None:
        asked.append(url)
        return LocalBlobs(tmp_path / "bucket") if url.startswith("s3://") else None

    config = {"storage.url": "s3://bucket"}
    async with make_kernel(tmp_path, plugins=[plugin("bucket", corral_blob_store=serve)], config=config) as kit:
        store: Any = kit.kernel.container.get(BlobStore)
        assert (asked, store.folder) == (["s3://bucket"], tmp_path / "bucket")
    refuses = plugin("bucket", corral_blob_store=lambda self, url: None)
    with pytest.raises(StartupError, match=r"\[storage\] url: no active plugin supports s3://"):
        async with make_kernel(tmp_path, plugins=[refuses], config=config):
            pass
    async with make_kernel(tmp_path, plugins=[]) as kit:
        store = kit.kernel.container.get(BlobStore)
        assert store.folder == tmp_path / "data" / "files"


class CountingBus:
    """A bell that counts."""

    def __init__(self) -> None:
        self.rings, self.started, self.stopped = 0, False, False
        self._wake: Callable[[], None] = lambda: None

    def notify(self) -> None:
        self.rings += 1
        self._wake()

    async def start(self, wake: Callable[[], None]) -> None:
        self.started, self._wake = True, wake

    async def stop(self) -> None:
        self.stopped = True


async def test_corral_bus(tmp_path: Path) -> None:
    bell = CountingBus()

    def serve(self: Any, url: str) -> Bus | None:
        return bell if url.startswith("redis://") else None

    def fail(self: Any, url: str) -> Bus | None:
        raise OSError("no luck")

    config = {"redis.url": "redis://:secret@localhost/0"}
    plugins = [plugin("bells", corral_bus=serve), plugin("alas", corral_bus=fail)]
    async with make_kernel(tmp_path, plugins=plugins, config=config) as kit:
        assert kit.loaded("alas").state == "failed"  # alone
        assert bell.started
        await kit.as_user("viewer")
        assert bell.rings > 0
    assert bell.stopped
    async with make_kernel(tmp_path, plugins=plugins[1:], config=config) as kit:
        assert isinstance(kit.kernel.bus, RedisBus)  # Corral's own is asked last


class ListQueue:
    """Implements `SharedJobQueue`; tells what was put."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.stopped = False

    def announce(self, ids: Sequence[str]) -> None:
        self.ids.extend(ids)

    async def start(self) -> None:
        self.ids.clear()

    async def stop(self) -> None:
        self.stopped = True

    def receive(self, take: Callable[[str], None], stopping: threading.Event) -> None:
        while self.ids and not stopping.is_set():
            take(self.ids.pop())


async def test_corral_job_queue(tmp_path: Path) -> None:
    queue, done = ListQueue(), list[str]()

    def serve(self: Any, url: str) -> SharedJobQueue | None:
        return queue if url.startswith("redis://") else None

    def jobs(self: Any) -> Iterable[Job]:
        return [Job("lists.note", lambda word: done.append(word))]

    lists = plugin("lists", corral_job_queue=serve, corral_jobs=jobs)
    async with make_kernel(tmp_path, plugins=[lists], config={"redis.url": "redis://localhost:1/0"}) as kit:
        made = await kit.kernel.database.work(lambda: [enqueue("lists.note", word="now"), _later()])
        assert queue.ids == made[:1]  # what is not due yet is found by the look at the table
        assert await kit.run_jobs() == 0  # left to the queue for a while
        loop = asyncio.get_running_loop()

        def take(identifier: str) -> None:
            asyncio.run_coroutine_threadsafe(kit.kernel.runner.start_job(identifier), loop).result(60)

        queue.ids.append(made[0])  # twice is once
        await asyncio.to_thread(queue.receive, take, threading.Event())
        await wait_for(done)
        await kit.kernel.runner.drain(5)
        assert done == ["now"]
    assert queue.stopped


def _later() -> str:
    return enqueue("lists.note", delay_seconds=60, word="later")
