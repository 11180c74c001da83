"""A world with webhooks: a member, who owns them, and receivers on the loopback interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.plugins.webhooks.receivers import Receiver

from corral import clock
from corral.events.event import Event, emit
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.webhooks.service.dispatcher import WebhookDispatcher

ALLOWED = {"egress.allow": ["127.0.0.0/8"]}


class ThingHappened(Event, kw_only=True):
    """Something happened."""

    event = "things.happened"
    area = "webhooks"

    thing_id: str
    status: str = "new"


class ThingsPlugin(Plugin):
    """Things, which happen when a test says so."""

    name = "things"

    @hookimpl
    def corral_events(self) -> list[type[Event]]:
        return [ThingHappened]


PLUGINS: tuple[Any, ...] = ("admin", "settings", "webhooks", ThingsPlugin)


class Hooks:
    """`member` owns the webhooks, and `stranger` is another member. Nothing happens by itself: `run` delivers."""

    kit: Kit
    member: Client
    stranger: Client
    admin: Client

    async def build(self, kit: Kit) -> Hooks:
        self.kit = kit
        self.member, self.stranger = await kit.as_user("member"), await kit.as_user("member")
        self.admin = await kit.as_user("admin")
        return self

    @property
    def dispatcher(self) -> WebhookDispatcher:
        return self.kit.service(WebhookDispatcher)

    async def create(self, receiver: Receiver | str, *events: str, by: Client | None = None, **fields: Any) -> Any:
        """A new webhook; the body of the answer."""
        url = receiver if isinstance(receiver, str) else receiver.url
        body = {"url": url, "events": list(events) or ["things.*"], **fields}
        return await self.ok((by or self.member).post("/webhooks", body), 201)

    async def emit(self, *things: str, status: str = "new", **options: Any) -> list[str]:
        """Log events about things; their ids."""

        def unit() -> list[str]:
            return [
                emit(ThingHappened(thing_id=each, status=status), object=("thing", each), **options) for each in things
            ]

        return await self.kit.work(unit)

    async def run(self, *, seconds: float = 0.0, rounds: int = 1) -> None:
        """Let time pass, and deliver what is due then."""
        if seconds:
            clock.travel(seconds)
        for _ in range(rounds):
            await self.kit.events()  # on PostgreSQL, until all events are numbered
            await self.dispatcher.run_once()
            await self.dispatcher.wait_until_idle()

    async def run_all(self) -> None:
        """Deliver until nothing is due."""
        while True:
            await self.kit.events()
            await self.dispatcher.run_once()
            if not self.dispatcher.is_busy:
                return
            await self.dispatcher.wait_until_idle()

    async def deliveries(self, webhook_id: str, status: str | None = None) -> list[Any]:
        """The deliveries to a webhook, oldest first."""
        query = "?limit=200" + (f"&status={status}" if status else "")
        found = await self.ok(self.member.get(f"/webhooks/{webhook_id}/deliveries{query}"))
        return list(reversed(found["items"]))

    async def delivery(self, webhook_id: str) -> Any:
        """The only delivery to a webhook, with payload and attempts."""
        (row,) = await self.deliveries(webhook_id)
        return await self.ok(self.member.get(f"/webhooks/{webhook_id}/deliveries/{row['id']}"))

    async def get(self, webhook_id: str) -> Any:
        """The webhook now."""
        return await self.ok(self.member.get(f"/webhooks/{webhook_id}"))

    async def set(self, name: str, value: Any) -> None:
        """Change a setting."""
        category, _, key = name.partition(".")
        await self.ok(self.admin.put(f"/settings/{category}/{key}", {"value": value}))

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
async def hooks(make_kit: Callable[..., Any]) -> Hooks:
    """A world with webhooks, on each engine."""
    return await Hooks().build(await make_kit(plugins=PLUGINS, config=ALLOWED))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as made:
        yield made
