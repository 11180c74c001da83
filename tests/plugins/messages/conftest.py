"""A world with messages: people, agents of the member, and a worker whose claims deliver messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tests.plugins.tasks.conftest import Lease, World

from corral import clock
from corral.events.log import EventRow
from corral.testing.kit import Client
from corral_plugins.messages.models import TABLES

PLUGINS = ("admin", "agents", "workers", "tasks", "tools", "messages")


class Post(World):
    """The world of tasks with messages. The agents belong to `member`; `other` is another member."""

    other: Client

    async def build(self, kit: Any) -> Post:
        await super().build(kit)
        self.other = await kit.as_user("member", "other@example.org")
        return self

    async def send(self, to: str | None = None, *, by: Client | None = None, **fields: Any) -> Any:
        """Send a message to an agent, or to whom the fields name; the answer's body."""
        body = {"body": "Hello", **fields}
        if to is not None:
            body["recipient_agent_id"] = to
        answer = await (by or self.member).post("/messages/send", body)
        assert answer.status == 201, answer
        return answer.json()

    async def message(self, message_id: str) -> Any:
        """The message now."""
        answer = await self.member.get(f"/messages/{message_id}")
        assert answer.status == 200, answer
        return answer.json()

    async def status(self, message_id: str) -> str:
        """The status of the message now."""
        return str((await self.message(message_id))["status"])

    async def lease_of(self, agent_id: str, **fields: Any) -> Lease:
        """A run of the agent, which its claim has given the agent's messages."""
        await self.task(agent_id=agent_id, **fields)
        return await self.worker.run(agent_ids=[agent_id])

    async def token(self, agent_id: str, *scopes: str) -> Client:
        """A client with a standing token of the agent."""
        body = {"name": "token", "scopes": list(scopes or ("*",))}
        answer = await self.member.post(f"/agents/{agent_id}/tokens", body)
        assert answer.status == 201, answer
        return Client(self.kit.application.app, answer.json()["token"])

    async def later(self, seconds: float) -> None:
        """Let time pass. The member signs in again, because access tokens expire."""
        clock.travel(seconds)
        self.member = await self.kit.sign_in(self.member.user["email"])

    async def sweep(self) -> None:
        """Run the sweep."""
        await self.kit.run_schedule("messages.sweep")

    async def payloads(self, kind: str) -> list[dict[str, Any]]:
        """The payloads of all events of a type, oldest first."""

        def read() -> list[dict[str, Any]]:
            found = EventRow.select(EventRow.data).where(EventRow.type == kind).order_by(EventRow.ins)
            return [msgspec.json.decode(row.data) for row in found]

        return await self.kit.work(read, read=True)

    async def stored(self) -> str:
        """Every row of messages, as text."""

        def dump() -> str:
            return str([list(model.select().dicts()) for model in TABLES])

        return await self.kit.work(dump, read=True)


def received(lease: Lease) -> list[str]:
    """The ids of the messages that the claim delivered."""
    return [each["id"] for each in lease.claim["context"]["messages"]]


def attempt(post: World, lease: Lease) -> Client:
    """A client with the attempt token of a run."""
    return Client(post.kit.application.app, lease.claim["agent_token"])


@pytest.fixture
async def post(make_kit: Callable[..., Any]) -> Post:
    """A world with messages, on each engine."""
    return await Post().build(await make_kit(plugins=PLUGINS))
