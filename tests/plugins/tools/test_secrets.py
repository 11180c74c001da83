"""Secrets in the headers of HTTP tools: filled in when the request is sent, for listed hosts only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.plugins.tools.conftest import Run, World
from tests.plugins.tools.receiver import Receiver, receiver

pytestmark = pytest.mark.one_engine

VALUE = "tok-9a8b7c6d5e4f-of-the-shop"
RULE = {"policy": "allow", "when_tainted": "allow"}
HEADERS = {"Authorization": "Bearer {{ secrets.Shop }}", "X-Plain": "as it is"}


@pytest.fixture
async def server() -> AsyncIterator[Receiver]:
    async with receiver() as made:
        yield made


@pytest.fixture
async def world(make_kit: Callable[..., Any], server: Receiver) -> World:
    async def make(**options: Any) -> Any:
        options["plugins"].append("secrets")
        return await make_kit(**options)

    allowed = [f"127.0.0.1:{server.port}", f"localhost:{server.port}"]
    return await World().build(make, config={"egress.allow": allowed})


async def started(world: World, **fields: Any) -> Run:
    """A run of an agent with both tools, and the secret `Shop`."""
    agent_id = await world.agent(
        "http.*", tool_policy=dict.fromkeys(("http.fetch", "http.request"), RULE), by=world.admin
    )
    consumers = fields.pop("consumers", [f"agent:{agent_id}"])
    secret = {"name": "Shop", "value": VALUE, "allowed_consumers": consumers, "allowed_hosts": ["127.0.0.1"], **fields}
    answer = await world.admin.post("/secrets", secret)
    assert answer.status == 201, answer
    assert (await world.member.post("/tasks", {"title": "work", "agent_id": agent_id})).status == 201
    return await world.claim(agent_id)


async def error(run: Run, tool: str, arguments: dict[str, Any]) -> str:
    answer = await run.tool(tool, arguments)
    assert answer.status == 200, answer
    assert VALUE.encode() not in answer.body
    found: str = answer.json()["error"]["type"]
    return found


async def test_a_header_gets_the_value_and_the_record_keeps_the_name(world: World, server: Receiver) -> None:
    run = await started(world)
    server.pages["/echo"] = (200, {"Content-Type": "text/plain"}, f"you sent {VALUE}".encode())

    async def known() -> bool:
        return VALUE not in world.kit.kernel.redactor.redact(VALUE, patterns=False)

    while not await known():  # noqa: ASYNC110  (what is waited for has no bell)
        await asyncio.sleep(0.02)
    for tool, more in (("http.fetch", {}), ("http.request", {"method": "POST", "body": "x"})):
        answer = await run.tool(tool, {"url": server.url("/echo"), "headers": HEADERS, **more})
        assert answer.status == 200, answer
        assert answer.json()["result"]["text"] == "you sent [redacted]"
        assert server.headers[-1]["authorization"] == f"Bearer {VALUE}"
        assert server.headers[-1]["x-plain"] == "as it is"
    kept = str(await run.calls())
    assert "Bearer {{ secrets.Shop }}" in kept
    assert VALUE not in kept


@pytest.mark.parametrize("tool", ["http.fetch", "http.request"])
async def test_secrets_7_a_host_that_is_not_listed_gets_no_connection(
    world: World, server: Receiver, tool: str
) -> None:
    run = await started(world)
    more = {"method": "POST"} if tool == "http.request" else {}
    assert await error(run, tool, {"url": server.url("/x", "localhost"), "headers": HEADERS, **more}) == "forbidden"
    assert server.seen == []


async def test_only_listed_agents_and_tools_get_a_secret(world: World, server: Receiver) -> None:
    run = await started(world, consumers=["tool:http.request"])
    assert await error(run, "http.fetch", {"url": server.url("/x"), "headers": HEADERS}) == "forbidden"
    assert server.seen == []
    answer = await run.tool("http.request", {"url": server.url("/x"), "method": "POST", "headers": HEADERS})
    assert answer.json()["error"] is None
    assert server.headers[-1]["authorization"] == f"Bearer {VALUE}"
    unknown = {"url": server.url("/x"), "headers": {"X-Key": "{{secrets.Nobody}}"}}
    assert await error(run, "http.fetch", unknown) == "not_found"


async def test_secrets_stand_in_values_of_headers_alone(world: World, server: Receiver) -> None:
    run = await started(world)
    for arguments in (
        {"url": server.url("/{{ secrets.Shop }}")},
        {"url": server.url("/x"), "headers": {"{{ secrets.Shop }}": "x"}},
        {"url": server.url("/x"), "headers": {"X-Key": "{{ secrets.Shop + 'x' }}"}},
        {"url": server.url("/x"), "headers": {"X-Key": "{{ upper(secrets.Shop) }}"}},
    ):
        assert await error(run, "http.fetch", arguments) == "invalid_arguments"
    body = {"url": server.url("/x"), "method": "POST", "body": "key={{ secrets.Shop }}"}
    assert await error(run, "http.request", body) == "invalid_arguments"
    assert server.seen == []


async def test_a_value_of_several_lines_does_not_fit_a_header(world: World, server: Receiver) -> None:
    run = await started(world, value="first line of it\nX-Injected: yes")
    assert await error(run, "http.fetch", {"url": server.url("/x"), "headers": HEADERS}) == "invalid_arguments"
    assert server.seen == []


async def test_without_a_vault_there_are_no_secrets(make_kit: Callable[..., Any], server: Receiver) -> None:
    world = await World().build(make_kit, config={"egress.allow": [f"127.0.0.1:{server.port}"]})
    agent_id = await world.agent("http.*", tool_policy={"http.fetch": RULE}, by=world.admin)
    await world.member.post("/tasks", {"title": "work", "agent_id": agent_id})
    run = await world.claim(agent_id)
    assert await error(run, "http.fetch", {"url": server.url("/x"), "headers": HEADERS}) == "plugin_disabled"
    assert server.seen == []
