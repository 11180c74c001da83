"""A world with notifications: an admin, two members, and services on the loopback interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from tests.kernel.mail.conftest import MailServer
from tests.plugins.notifications.services import Service

from corral import clock
from corral.events.event import Event, SystemAlert, emit
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.notifications.service import slack as slack_module
from corral_plugins.notifications.service import telegram as telegram_module
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.tasks.api import TaskFailed

ALLOWED = {"egress.allow": ["127.0.0.0/8"], "server.public_url": "https://corral.example"}


class ThingHappened(Event, kw_only=True):
    """Something happened."""

    event = "things.happened"
    area = "notifications"

    thing_id: str
    title: str = "a thing"
    agent_id: str = "one"


class ThingsPlugin(Plugin):
    """Things, which happen when a test says so."""

    name = "things"

    @hookimpl
    def corral_events(self) -> list[type[Event]]:
        return [ThingHappened]


PLUGINS: tuple[Any, ...] = (
    "admin",
    "agents",
    "approvals",
    "circuit_breakers",
    "messages",
    "notifications",
    "secrets",
    "settings",
    "tasks",
    "triggers",
    "webhooks",
    "workers",
    "workflows",
    ThingsPlugin,
)


class Notified:
    """`member` owns the tasks, and `stranger` is another member. Nothing happens by itself: `run` delivers."""

    kit: Kit
    member: Client
    stranger: Client
    admin: Client

    async def build(self, kit: Kit) -> Notified:
        self.kit = kit
        self.member, self.stranger = await kit.as_user("member"), await kit.as_user("member")
        self.admin = await kit.as_user("admin")
        await self.run()
        return self

    @property
    def dispatcher(self) -> NotificationDispatcher:
        return self.kit.service(NotificationDispatcher)

    async def fail_task(
        self, *tasks: str, owner: Client | None = None, agent_id: str | None = None, **more: Any
    ) -> None:
        """Log that tasks of the member failed."""
        user_id = (owner or self.member).user["id"]
        error = {"kind": "error", "type": "broken", "message": more.pop("message", "It broke.")}

        def unit() -> None:
            for each in tasks:
                event = TaskFailed(
                    task_id=each,
                    title=more.get("title", f"task {each}"),
                    status="failed",
                    previous="running",
                    priority="medium",
                    agent_id=agent_id,
                    worker_id=None,
                    attempt=1,
                    error=error,
                )
                emit(event, object=("task", each), owner=user_id)

        await self.kit.work(unit)

    async def happen(self, *things: str, **fields: Any) -> None:
        """Log events about things, which concern nobody without a rule."""

        def unit() -> None:
            for each in things:
                emit(ThingHappened(thing_id=each, **fields), object=("thing", each))

        await self.kit.work(unit)

    async def alert(self, title: str, severity: str = "warning", **fields: Any) -> None:
        """Log an alert."""
        event = SystemAlert(kind=fields.pop("kind", "test"), severity=severity, title=title, detail="", **fields)
        await self.kit.work(lambda: emit(event, object=("test", title[:60])))

    async def run(self, *, seconds: float = 0.0) -> None:
        """Let time pass, and deliver until nothing is due."""
        if seconds:
            clock.travel(seconds)
        while True:
            await self.kit.events()  # on PostgreSQL, until all events are numbered
            wait = await self.dispatcher.run_once()
            if not self.dispatcher.is_busy and wait:
                return
            await self.dispatcher.wait_until_idle()

    async def inbox(self, client: Client, query: str = "") -> list[Any]:
        found = await self.ok(client.get(f"/notifications?limit=200{query}"))
        return list(found["items"])

    async def channel(self, kind: str, config: Any, name: str | None = None) -> Any:
        body = {"name": name or f"my {kind}", "type": kind, "config": config}
        return await self.ok(self.admin.post("/notifications/channels", body), 201)

    async def rule(self, *channels: Any, events: tuple[str, ...] = ("task.failed",), **fields: Any) -> Any:
        body = {
            "name": fields.pop("name", f"rule {len(channels)}"),
            "events": list(events),
            "channel_ids": [each["id"] for each in channels],
            "in_app": False,
            "group_wait_seconds": 0,
            **fields,
        }
        return await self.ok(self.admin.post("/notifications/rules", body), 201)

    async def deliveries(self, status: str = "") -> list[Any]:
        query = f"&status={status}" if status else ""
        found = await self.ok(self.admin.get(f"/notifications/deliveries?limit=200{query}"))
        return list(reversed(found["items"]))

    async def later(self, seconds: float) -> None:
        """Let time pass. The people sign in again, because access tokens expire."""
        clock.travel(seconds)
        for name in ("member", "stranger", "admin"):
            setattr(self, name, await self.kit.sign_in(getattr(self, name).user["email"]))

    @staticmethod
    async def ok(request: Any, status: int = 200) -> Any:
        """The body of an answer that must have this status."""
        answer: Answer = await request
        assert answer.status == status, answer
        return answer.json() if answer.body else None


@pytest.fixture
def smtp() -> Iterator[MailServer]:
    server = MailServer().start()
    yield server
    server.stop()


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> Notified:
    """A world without a mail server."""
    return await Notified().build(await make_kit(plugins=PLUGINS, config=ALLOWED))


@pytest.fixture
async def mailing(make_kit: Callable[..., Any], smtp: MailServer) -> Notified:
    """A world whose mail goes to `smtp`."""
    return await Notified().build(await make_kit(plugins=PLUGINS, config=smtp.config()))


@pytest.fixture
async def slack(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    async with Service("slack") as service:
        monkeypatch.setattr(slack_module, "WEBHOOKS", service.url)
        monkeypatch.setattr(slack_module, "API", service.url + "api/chat.postMessage")
        yield service


@pytest.fixture
async def telegram(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    async with Service("telegram") as service:
        monkeypatch.setattr(telegram_module, "API", service.url.rstrip("/"))
        yield service
