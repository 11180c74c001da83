"""People of every role and machines of every kind on a kernel with all active plugins; all made by HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.generated.operations import Operation, operations

from corral.events.log import EventRow
from corral.testing.kit import PASSWORD, Client, Kit
from corral_plugins.cost.service import price_table

# Known to the tests, so that they can forge as well as one could who had it.
JWT_SECRET = "of-the-tests-and-long-enough-for-every-algorithm-0123456789abcdef-0123456789"
CONFIG = {"keys.jwt_secret": JWT_SECRET}


class World:
    """`owner` owns what is made; `stranger` is a member like them. `admin` has stepped up. `worker` is approved."""

    kit: Kit
    operations: list[Operation]
    admin: Client
    owner: Client
    stranger: Client
    viewer: Client
    auditor: Client
    worker: Client
    registration_key: Client

    async def build(self, kit: Kit) -> World:
        self.kit = kit
        await asyncio.to_thread(price_table.load_price_table)  # as a server does when it starts; not in the first unit
        down = {each.name: each.reason for each in kit.kernel.plugins if each.state in ("failed", "blocked")}
        assert down == {}
        self.operations = await operations(kit)
        self.admin = await kit.as_user("admin", "admin@example.org")
        self.owner = await kit.as_user("member", "owner@example.org")
        self.stranger = await kit.as_user("member", "stranger@example.org")
        self.viewer = await kit.as_user("viewer", "viewer@example.org")
        self.auditor = await kit.as_user("auditor", "auditor@example.org")
        await self.ok(self.admin, "POST", "/auth/reauth", {"password": PASSWORD})
        self.worker = await self.machine("worker")
        made = await self.ok(self.admin, "POST", "/admin/registration-keys", {"name": "site"})
        self.registration_key = self.client(made["key"])
        return self

    def client(self, token: str) -> Client:
        """A client with this credential."""
        return Client(self.kit.application.app, token)

    @staticmethod
    async def ok(client: Client, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """A request that succeeds; what it answers."""
        answer = await client.request(method, path, body, **options)
        assert 200 <= answer.status < 300, f"{method} {path}: {answer.body!r}"
        return answer.json() if answer.body else None

    async def machine(self, name: str) -> Client:
        """A new worker, approved and online; `user` is its row."""
        made = await self.ok(self.admin, "POST", "/workers/register", {"name": name, "max_agents": 100})
        await self.ok(self.admin, "PATCH", f"/admin/workers/{made['id']}/approve", {"is_approved": True})
        client = Client(self.kit.application.app, made["token"], made)
        await self.ok(client, "POST", f"/workers/{made['id']}/heartbeat", {})
        return client

    async def agent(self, owner: Client, name: str, **fields: Any) -> str:
        """A new agent that may claim; its id."""
        fields = {"name": name, "max_concurrent_tasks": 100, **fields}
        made = await self.ok(owner, "POST", "/agents", fields)
        await self.ok(owner, "POST", f"/agents/{made['id']}/start", {})
        return str(made["id"])

    async def lease(self, owner: Client, name: str, **fields: Any) -> Any:
        """A task that an agent of the owner runs on the worker: the claim."""
        agent = await self.agent(owner, name, **fields)
        task = {"title": name, "agent_id": agent, "priority": "critical"}
        await self.ok(owner, "POST", "/tasks", task)
        wanted = {"agent_ids": [agent]}
        answer = await self.ok(self.worker, "POST", f"/workers/{self.worker.user['id']}/claim", wanted)
        (claim,) = answer["tasks"]
        await self.ok(self.client(claim["agent_token"]), "POST", f"/tasks/{claim['task']['id']}/start", {})
        return claim

    async def user_like(self, role: str, email: str) -> Client:
        """Another person of this role, whose session or account a test may end."""
        return await self.kit.as_user(role, email)

    async def again(self, person: Client) -> dict[str, Any]:
        """Another session of this person: the whole answer of signing in."""
        credentials = {"email": person.user["email"], "password": PASSWORD}
        found: dict[str, Any] = await self.ok(self.kit.client, "POST", "/auth/login", credentials)
        return found

    async def settle(self) -> None:
        """Wait until every event has its number and nobody's last second of cached rights is left."""
        unnumbered = EventRow.select().where(EventRow.seq.is_null())
        while await self.kit.kernel.database.work(unnumbered.exists, read=True):  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)
        self.kit.kernel.credentials.forget(lambda principal: True)
