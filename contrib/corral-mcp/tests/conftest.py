"""Fixtures: a kernel with the plugin `mcp`, an MCP server written with the SDK, and an agent that runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvicorn
from corral_mcp.plugin import McpPlugin

from corral.testing.kit import Client, Kit, make_kernel
from corral.testing.server import ServerProcess, free_port

sys.path.insert(0, str(Path(__file__).parent))
from docs_server import make_server

DOCS_SERVER = Path(__file__).parent / "docs_server.py"
PLUGINS = (
    "admin",
    "agents",
    "approvals",
    "audit",
    "circuit_breakers",
    "secrets",
    "security",
    "tasks",
    "tools",
    "workers",
)


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """Serve an ASGI application on a port of this machine."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        await running


class DocsServer:
    """An MCP server over HTTP, whose tool `search` has the given description."""

    def __init__(self) -> None:
        self.sdk = make_server("Searches the documents.")
        self.port = 0
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    def describe(self, description: str) -> None:
        """Change the description of `search`."""
        self.sdk.remove_tool("search")
        self.sdk.add_tool(lambda text: f"found {text}", name="search", description=description)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[DocsServer]:
        inner = self.sdk.streamable_http_app()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await inner(scope, receive, send)

        async with serving(app) as self.port:
            yield self


on_the_loop_of_the_module = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def docs() -> AsyncIterator[DocsServer]:
    async with DocsServer().running() as server:
        yield server


class World:
    """`admin` manages servers; `member` owns the agents, whose tasks a worker runs."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.admin: Client
        self.member: Client
        self.worker: Client

    async def build(self) -> World:
        self.admin, self.member = await self.kit.as_user("admin"), await self.kit.as_user("member")
        new = {"name": f"worker {self.admin.user['id']}", "max_agents": 100}
        made = (await self.admin.post("/workers/register", new)).json()
        await self.admin.patch(f"/admin/workers/{made['id']}/approve", {"is_approved": True})
        self.worker, self.worker_id = Client(self.kit.application.app, made["token"]), made["id"]
        await self.worker.post(f"/workers/{self.worker_id}/heartbeat", {})
        return self

    async def run(self, *tools: str) -> Callable[..., Any]:
        """Start a task of a new agent with these tools. Return a function that calls a tool as the agent."""
        body = {"name": uuid.uuid4().hex, "enabled_tools": list(tools)}
        agent_id = (await self.member.post("/agents", body)).json()["id"]
        await self.member.post(f"/agents/{agent_id}/start")
        await self.member.post("/tasks", {"title": "work", "agent_id": agent_id})
        claimed = await self.worker.post(f"/workers/{self.worker_id}/claim", {"agent_ids": [agent_id]})
        (claim,) = claimed.json()["tasks"]
        task_id = claim["task"]["id"]
        await self.worker.post(f"/tasks/{task_id}/start", {"lease_id": claim["lease_id"]})
        agent, number = Client(self.kit.application.app, claim["agent_token"]), 0

        async def call(name: str, **arguments: Any) -> Any:
            nonlocal number
            number += 1
            call = {"call_id": f"call-{number}", "arguments": arguments}
            return await agent.post(f"/tasks/{task_id}/tools/{name}", call)

        return call

    async def add(self, url: str, name: str = "docs", **fields: Any) -> Any:
        """Add an MCP server."""
        answer = await self.admin.post("/tools/mcp-servers", {"name": name, "url": url, **fields})
        assert answer.status == 201, answer
        return answer.json()

    async def accept(self, view: Any) -> Any:
        """Accept everything that a server lists."""
        hashes = [tool["definition_sha256"] for tool in view["tools"]]
        answer = await self.admin.post(f"/tools/mcp-servers/{view['name']}/accept", {"definition_sha256": hashes})
        assert answer.status == 200, answer
        return answer.json()


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param("sqlite", marks=pytest.mark.sqlite), pytest.param("postgres", marks=pytest.mark.postgres)],
)
async def kit_with_mcp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kit]:
    folder = tmp_path_factory.mktemp("kernel")
    url = f"sqlite:///{folder}/corral.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_server").unused_database_url()
    config = {"egress.allow": ["127.0.0.1"]}
    async with make_kernel(folder, database_url=url, plugins=[*PLUGINS, McpPlugin], config=config) as kit:
        assert kit.loaded("mcp").active, kit.loaded("mcp").reason
        yield kit


@pytest_asyncio.fixture(loop_scope="module")
async def world(kit_with_mcp: Kit) -> AsyncIterator[World]:
    """A world of its own on a kernel that the tests of a module share. Afterwards no MCP server is left."""
    world = await World(kit_with_mcp).build()
    yield world
    for server in (await world.admin.get("/tools/mcp-servers")).json()["items"]:
        answer = await world.admin.delete(f"/tools/mcp-servers/{server['name']}")
        assert answer.status == 204, answer


def run_agent(folder: Path, servers: dict[str, Any], tool: str, arguments: dict[str, Any]) -> Any:
    """Run a server, a worker with these MCP servers, and an agent that calls one tool. Return the call."""
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    turns = [{"tool_calls": [{"name": tool.replace(".", "__"), "arguments": arguments}]}, {"text": "Done."}]
    (folder / "script.json").write_text(json.dumps({"turns": turns}))
    config = folder / "corral.toml"
    config.write_text(f"[plugins.llm.scripts]\ncaller = {json.dumps(str(folder / 'script.json'))}\n")
    with ServerProcess(folder, environ={"CORRAL_CONFIG": str(config)}) as server:
        client = server.sign_in()
        key = client.post("/admin/registration-keys", json={"name": "site"}).json()["key"]
        command = [sys.executable, "-m", "corral", "worker", "--url", server.address, "--name", "site"]
        command += ["--dir", str(folder / "worker"), "--mcp", str(folder / "mcp.json")]
        environ = {**server.environ, "CORRAL_WORKER_TOKEN": key}
        with (folder / "worker.log").open("wb") as log:
            worker = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(folder, lambda: client.get("/workers").json()["items"])
            (made,) = client.get("/workers").json()["items"]
            client.patch(f"/admin/workers/{made['id']}/approve", json={"is_approved": True})
            body = {"name": "caller", "enabled_tools": [tool], "llm_provider": "scripted", "llm_model": "caller"}
            agent = client.post("/agents", json=body).json()["id"]
            client.post(f"/agents/{agent}/start")
            task = client.post("/tasks", json={"title": "Call", "agent_id": agent, "required_tools": [tool]}).json()
            ended = ("completed", "failed")
            wait_for(folder, lambda: client.get(f"/tasks/{task['id']}").json()["status"] in ended)
            (found,) = client.get(f"/tasks/{task['id']}/tool-calls").json()["items"]
            return found
        finally:
            os.killpg(worker.pid, signal.SIGTERM)
            worker.wait(120)


def wait_for(folder: Path, condition: Callable[[], Any]) -> None:
    """Wait until a condition holds, and show the log of the worker if it does not."""
    until = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < until, (folder / "worker.log").read_text()
        time.sleep(0.1)
