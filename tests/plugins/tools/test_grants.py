"""Who may give an agent tools: each way to give more than one may, by each operation that writes an agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from tests.plugins.tools.conftest import TEXT, World

from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Answer, Client, Kit
from corral_plugins.tools.api import Json, Tool

# What only admins may give. `test.danger` is dangerous, and `vault.open` needs a permission that members lack.
ADMINS_ONLY: dict[str, Json] = {
    "a tool that one may not use": {"enabled_tools": ["vault.open"]},
    "a prefix of such a tool": {"enabled_tools": ["vault.*"]},
    "a dangerous tool without a question": {"tool_policy": {"test.danger": "allow"}},
    "the same as an object": {"tool_policy": {"test.danger": {"policy": "allow"}}},
    "a prefix of a dangerous tool": {"tool_policy": {"test.*": "allow"}},
    "a tool that does not exist yet": {"tool_policy": {"later.tool": "allow"}},
    "less than the default of a dangerous tool": {"tool_policy": {"closed.danger": "ask"}},
    "a prefix with less than the default": {"tool_policy": {"closed.*": {"policy": "ask"}}},
    "a tainted run": {"tool_policy": {"test.page": {"when_tainted": "allow"}}},
    "a tainted run, by a prefix": {"tool_policy": {"test.*": {"policy": "ask", "when_tainted": "allow"}}},
}
ANYBODY: dict[str, Json] = {
    "tools of every risk": {"enabled_tools": ["test.read", "test.write", "test.page", "test.danger"]},
    "an external tool without a question": {"tool_policy": {"test.page": "allow"}},
    "a question": {"tool_policy": {"test.danger": "ask", "test.read": {"policy": "ask", "when_tainted": "deny"}}},
    "a refusal": {"tool_policy": {"test.*": "deny", "closed.danger": "deny"}},
}


class GuardedTools(Plugin):
    """Tools that members cannot give to an agent without an admin."""

    name = "guarded"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        fields: Any = {"title": "guarded", "description": "guarded", "schema": TEXT, "run": lambda *_: None}
        return [
            Tool(name="vault.open", risk="write", permission="tools.manage", **fields),
            Tool(name="closed.danger", risk="dangerous", **fields),
        ]


@pytest.fixture
async def grants(make_kit: Callable[..., Awaitable[Kit]]) -> World:
    """A world in which an admin has closed `closed.danger`."""
    world = await World().build(make_kit, more=["security", GuardedTools])
    assert (await world.admin.patch("/tools/closed.danger", {"default_policy": "deny"})).status == 200
    return world


async def create(world: World, by: Client, fields: Json) -> Answer:
    world.count = getattr(world, "count", 0) + 1
    return await by.post("/agents", {"name": f"granted {world.count}", **fields})


async def agent_of(world: World, by: Client, fields: Json) -> str:
    answer = await create(world, by, fields)
    assert answer.status == 201, answer
    return str(answer.json()["id"])


async def patch(world: World, by: Client, fields: Json) -> Answer:
    """Change an agent of one's own that has nothing yet."""
    return await by.patch(f"/agents/{await agent_of(world, by, {})}", fields)


async def clone(world: World, by: Client, fields: Json) -> Answer:
    """Copy an admin's agent."""
    source = await agent_of(world, world.admin, fields)
    return await by.post(f"/agents/{source}/clone", {"name": f"copy of {source}"})


async def roll_back(world: World, by: Client, fields: Json) -> Answer:
    """Go back to what an admin wrote into one's own agent, and what one has then taken out."""
    agent_id = await agent_of(world, by, {})
    for who, change in ((world.admin, fields), (by, {"enabled_tools": [], "tool_policy": {}})):
        assert (await who.patch(f"/agents/{agent_id}", change)).status == 200
    return await by.post(f"/agents/{agent_id}/rollback", {"version": 2})


OPERATIONS = (create, patch, clone, roll_back)


@pytest.mark.one_engine
async def test_only_admins_give_more_than_members_may(grants: World) -> None:
    for operation in OPERATIONS:
        for way, fields in ADMINS_ONLY.items():
            answer = await operation(grants, grants.member, fields)
            assert (answer.status, answer.code) == (403, "forbidden"), (operation.__name__, way, answer)
        for way, fields in ANYBODY.items():
            answer = await operation(grants, grants.member, fields)
            assert answer.status in (200, 201), (operation.__name__, way, answer)
    for way, fields in {**ADMINS_ONLY, **ANYBODY}.items():
        for operation in (create, patch):
            answer = await operation(grants, grants.admin, fields)
            assert answer.status in (200, 201), (operation.__name__, way, answer)


@pytest.mark.one_engine
async def test_an_owner_keeps_but_does_not_widen_what_an_admin_gave(grants: World) -> None:
    rule = {"policy": "allow", "config": {"hosts": ["a.example"]}}
    agent_id = await agent_of(grants, grants.member, {})
    path = f"/agents/{agent_id}"
    policies = {"http.request": rule, "test.danger": "deny"}
    given = {"enabled_tools": ["vault.open"], "tool_policy": policies}
    assert (await grants.admin.patch(path, given)).status == 200
    same = {"system_prompt": "other", **given}
    assert (await grants.member.patch(path, same)).status == 200
    wider = {**rule, "config": {"hosts": ["b.example"]}}
    widened = await grants.member.patch(path, {"tool_policy": {**policies, "http.request": wider}})
    assert widened.status == 403, widened
    for policy in ({"http.request": rule, "test.danger": "ask"}, {"test.danger": "ask"}, {}):
        assert (await grants.member.patch(path, {"tool_policy": policy})).status == 200
    assert (await grants.member.patch(path, {"tool_policy": {"http.request": rule}})).status == 403


@pytest.mark.one_engine
async def test_a_key_gives_no_tools_beyond_its_scopes(grants: World) -> None:
    scopes: dict[str, list[str]] = {
        "test.read": ["agents.write", "tasks.read"],
        "test.write": ["agents.write", "tasks.write"],
        "test.page": ["agents.write", "tools.use_external"],
        "test.danger": ["agents.write", "tools.use_dangerous"],
    }
    for tool, needed in scopes.items():
        for given, status in ((["agents.write"], 403), (needed, 201)):
            made = await grants.member.post("/security/api-keys", {"name": "key", "scopes": given})
            assert made.status == 201, made
            key = Client(grants.kit.application.app, made.json()["key"])
            answer = await create(grants, key, {"enabled_tools": [tool]})
            assert answer.status == status, (tool, given, answer)


@pytest.mark.one_engine
async def test_nobody_else_writes_agents(grants: World) -> None:
    agent_id = await agent_of(grants, grants.member, {})
    made = await grants.member.post(f"/agents/{agent_id}/tokens", {"name": "all", "scopes": ["*"]})
    agent = Client(grants.kit.application.app, made.json()["token"])
    callers = [agent, grants.worker, await grants.kit.as_user("viewer"), await grants.kit.as_user("member")]
    for caller in callers:
        answer = await caller.patch(f"/agents/{agent_id}", {"enabled_tools": ["test.read"]})
        assert answer.status == 403, answer
