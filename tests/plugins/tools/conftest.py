"""A small world of tools: people, an agent with tools, a worker under a lease, and tools that record their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.tools.api import Json, Tool, ToolContext, ToolFailure

PLUGINS = ("admin", "agents", "workers", "tasks", "tools")
TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 200_000}},
    "required": ["text"],
    "additionalProperties": False,
}


class Bench:
    """The calls of the test's tools. `gate` holds `test.slow` until it is set."""

    def __init__(self) -> None:
        self.runs: list[Json] = []
        self.contexts: list[ToolContext] = []
        self.gate = asyncio.Event()

    def write(self, context: ToolContext, arguments: Json) -> Json:
        self.runs.append(arguments)
        self.contexts.append(context)
        return {"said": arguments["text"]}

    def fail(self, context: ToolContext, arguments: Json) -> Json:
        self.runs.append(arguments)
        raise ToolFailure("no_luck", f"not {arguments['text']}")

    def break_down(self, context: ToolContext, arguments: Json) -> Json:
        self.runs.append(arguments)
        raise RuntimeError("a secret detail")

    async def slow(self, context: ToolContext, arguments: Json) -> Json:
        self.runs.append(arguments)
        await self.gate.wait()
        return {"done": arguments["text"]}

    async def page(self, context: ToolContext, arguments: Json) -> str:
        self.runs.append(arguments)
        return str(arguments["text"])


class BenchPlugin(Plugin):
    """Tools that record their calls."""

    name = "test"
    wants = ("tools",)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.bench = Bench()

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        """Return the tools of the bench."""
        bench = self.bench

        def tool(name: str, risk: Any, run: Any, **more: Any) -> Tool:
            return Tool(name=name, title=name, description=name, risk=risk, schema=TEXT, run=run, **more)

        return [
            tool("test.write", "write", bench.write, permission="tasks.write"),
            tool("test.read", "read", bench.write, permission="tasks.read", idempotent=True),
            tool("test.fail", "write", bench.fail),
            tool("test.broken", "write", bench.break_down),
            tool("test.slow", "external", bench.slow, timeout_seconds=60),
            tool("test.again", "external", bench.slow, idempotent=True),
            tool("test.page", "external", bench.page, untrusted_output=True),
            tool("test.danger", "dangerous", bench.write),
            tool("locked.write", "write", bench.write, permission="tools.manage"),
        ]


def bench_of(kit: Kit) -> Bench:
    """Return the bench of the kit's `BenchPlugin`."""
    plugin = kit.loaded("test").plugin
    assert isinstance(plugin, BenchPlugin)
    return plugin.bench


class Run:
    """A started run of a task, whose worker calls tools."""

    def __init__(self, world: World, claim: Json) -> None:
        self.world, self.claim = world, claim
        self.task_id: str = claim["task"]["id"]
        self.lease_id: str = claim["lease_id"]
        self.agent = Client(world.kit.application.app, claim["agent_token"])
        self._n = 0

    async def tool(
        self, name: str, arguments: Any = None, *, call_id: str | None = None, by: Client | None = None
    ) -> Answer:
        """Call a tool with the attempt's token, under a new call_id unless one is given."""
        self._n += 1
        body = {"call_id": call_id or f"call-{self._n}", "arguments": {} if arguments is None else arguments}
        return await (by or self.agent).post(f"/tasks/{self.task_id}/tools/{name}", body)

    async def say(self, name: str, text: str = "hello", **options: Any) -> Answer:
        """Call one of the bench's tools."""
        return await self.tool(name, {"text": text}, **options)

    async def calls(self) -> list[Json]:
        """The calls of the task, oldest first."""
        answer = await self.world.member.get(f"/tasks/{self.task_id}/tool-calls")
        assert answer.status == 200, answer
        items: list[Json] = answer.json()["items"]
        return items


class World:
    """`member` owns an agent; `worker` runs its tasks."""

    kit: Kit
    admin: Client
    member: Client
    worker: Client
    worker_id: str
    bench: Bench

    async def build(
        self, make_kit: Callable[..., Awaitable[Kit]], *, more: Iterable[type[Plugin] | str] = (), **options: Any
    ) -> World:
        self.kit = await make_kit(plugins=[*PLUGINS, BenchPlugin, *more], **options)
        for name in (*PLUGINS, "test"):
            assert self.kit.loaded(name).active, (name, self.kit.loaded(name).reason)
        self.bench = bench_of(self.kit)
        self.admin, self.member = await self.kit.as_user("admin"), await self.kit.as_user("member")
        self.worker, self.worker_id = await self.machine("worker")
        return self

    async def until_running(self, count: int = 1) -> None:
        """Wait until this many calls of the bench have started."""
        for _ in range(6000):
            if len(self.bench.runs) >= count:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the tool did not begin")

    async def machine(self, name: str, **fields: Any) -> tuple[Client, str]:
        """Register and approve an online worker."""
        answer = await self.admin.post("/workers/register", {"name": name, "max_agents": 1000, **fields})
        assert answer.status == 201, answer
        worker_id, token = answer.json()["id"], answer.json()["token"]
        await self.admin.patch(f"/admin/workers/{worker_id}/approve", {"is_approved": True})
        client = Client(self.kit.application.app, token)
        assert (await client.post(f"/workers/{worker_id}/heartbeat", {})).status == 200
        return client, worker_id

    async def agent(self, *tools: str, by: Client | None = None, **fields: Any) -> str:
        """Create and start an agent with these tools."""
        self.count = getattr(self, "count", 0) + 1
        body = {"name": f"agent {self.count}", "enabled_tools": list(tools), "max_concurrent_tasks": 100, **fields}
        owner = by or self.member
        answer = await owner.post("/agents", body)
        assert answer.status == 201, answer
        agent_id: str = answer.json()["id"]
        assert (await owner.post(f"/agents/{agent_id}/start")).status == 200
        return agent_id

    async def run(self, *tools: str, task: Json | None = None, by: Client | None = None, **agent: Any) -> Run:
        """Start a run of a new task of a new agent with these tools."""
        agent_id = await self.agent(*tools, **agent)
        answer = await (by or self.member).post("/tasks", {"title": "work", "agent_id": agent_id, **(task or {})})
        assert answer.status == 201, answer
        return await self.claim(agent_id)

    async def claim(self, agent_id: str) -> Run:
        """Claim and start the agent's next task."""
        answer = await self.worker.post(f"/workers/{self.worker_id}/claim", {"agent_ids": [agent_id]})
        assert answer.status == 200, answer
        (claim,) = answer.json()["tasks"]
        run = Run(self, claim)
        started = await self.worker.post(f"/tasks/{run.task_id}/start", {"lease_id": run.lease_id})
        assert started.status == 200, started
        return run


@pytest.fixture
async def world(make_kit: Callable[..., Awaitable[Kit]]) -> World:
    """The world on each engine."""
    return await World().build(make_kit)
