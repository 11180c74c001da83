"""A stock MCP client, that of the SDK, uses Corral at `/mcp`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from conftest import World, on_the_loop_of_the_module, serving
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from corral.testing.kit import PASSWORD

pytestmark = on_the_loop_of_the_module


@contextlib.asynccontextmanager
async def connected(world: World, token: str, **options: Any) -> AsyncIterator[Client]:
    async with serving(world.kit.application.app) as port:
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=30)
        transport = streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)
        async with http, Client(transport, **options) as client:
            yield client


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_stock_client_runs_a_task(world: World, mode: str) -> None:
    async with connected(world, world.member.token, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"list_agents", "create_task", "get_task", "approve_request"} <= tools.keys()
        assert tools["create_task"].input_schema["required"] == ["title"]
        agent = await client.call_tool("create_agent", {"name": f"writer {mode}"})
        agent_id = agent.structured_content["id"]
        await client.call_tool("start_agent", {"id": agent_id})
        made = await client.call_tool("create_task", {"title": "Write", "agent_id": agent_id, "priority": "high"})
        assert (made.is_error, made.structured_content["priority"]) == (False, "high")
        task_id = made.structured_content["id"]
        found = await client.call_tool("list_tasks", {"agent_id": agent_id, "status": ["pending"]})
        assert [each["id"] for each in found.structured_content["items"]] == [task_id]
        await client.call_tool("cancel_task", {"id": task_id})
        read = await client.call_tool("get_task", {"id": task_id, "wait": 1})
        assert read.structured_content["status"] == "cancelled"
    assert (await world.member.get(f"/tasks/{task_id}")).json()["created_by"] == world.member.user["id"]


async def test_errors_are_the_problems_of_the_api(world: World) -> None:
    async with connected(world, world.member.token) as client:
        for name, arguments, code in (
            ("create_task", {"title": ""}, "validation_error"),
            ("create_task", {"title": "x", "nothing": 1}, "validation_error"),
            ("get_task", {"id": "01890a5d-ac96-774b-bcce-b302099a8057"}, "not_found"),
            ("get_task", {"id": "../agents"}, "not_found"),
            ("list_tasks", {"nothing": 1}, "validation_error"),
        ):
            answer = await client.call_tool(name, arguments)
            assert (answer.is_error, answer.structured_content["code"]) == (True, code), name
        with pytest.raises(Exception, match="no tool"):
            await client.call_tool("delete_everything", {})


async def test_the_rights_are_those_of_the_caller(world: World) -> None:
    viewer = await world.kit.as_user("viewer")
    async with connected(world, viewer.token) as client:
        assert not (await client.call_tool("list_tasks", {})).is_error
        refused = await client.call_tool("create_task", {"title": "x"})
        assert refused.structured_content["code"] == "forbidden"


async def test_an_api_key_has_its_scopes_and_decides_nothing(world: World) -> None:
    await world.admin.post("/auth/reauth", {"password": PASSWORD})
    body = {"name": "mcp", "scopes": ["tasks.read", "approvals.*"]}
    key = (await world.admin.post("/security/api-keys", body)).json()["key"]
    asked = (await world.member.post("/approvals", {"title": "May I?"})).json()["id"]
    async with connected(world, key) as client:
        assert not (await client.call_tool("list_tasks", {})).is_error
        listed = (await client.call_tool("list_approvals", {})).structured_content["items"]
        assert [each["id"] for each in listed] == [asked]
        refused = await client.call_tool("approve_request", {"id": asked})
        assert refused.structured_content["code"] == "insufficient_scope"
        refused = await client.call_tool("create_agent", {"name": "x"})
        assert refused.structured_content["code"] == "insufficient_scope"
    async with connected(world, world.admin.token) as client:
        decided = await client.call_tool("approve_request", {"id": asked, "note": "yes"})
        assert decided.structured_content["status"] == "approved"


async def test_without_a_credential_there_is_nothing(world: World) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    answer = await world.kit.client.request("POST", "/mcp", message, root=True)
    assert answer.status == 401
    for method in ("GET", "DELETE"):
        assert (await world.member.request(method, "/mcp", root=True)).status == 405


@pytest.mark.parametrize("message", [{}, {"jsonrpc": "1.0", "method": "ping"}, {"jsonrpc": "2.0", "x": 1}])
async def test_messages_that_are_none(world: World, message: Any) -> None:
    answer = await world.member.request("POST", "/mcp", message, root=True)
    assert (answer.status, answer.code) == (422, "validation_error")


async def test_errors_of_the_protocol_are_in_the_response(world: World) -> None:
    headers = {"Accept": "application/json, text/event-stream"}
    for method in ("tools/call", "no/such"):
        message = {"jsonrpc": "2.0", "id": 1, "method": method}
        answer = await world.member.request("POST", "/mcp", message, root=True, headers=headers)
        assert answer.status == 200
        assert "code" in answer.json()["error"]
