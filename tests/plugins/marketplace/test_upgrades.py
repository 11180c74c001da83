"""What upgrades and uninstallations may do, after the rights or the objects have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.marketplace.conftest import PLUGINS, Market, manifest, objects
from tests.plugins.marketplace.test_done_when import SafePlugin

pytestmark = pytest.mark.one_engine


async def newer(market: Market, version: str, **spec: Any) -> None:
    """Upload a version of the template whose agent has other fields."""
    template = manifest(version=version, permissions={"tools": ["tasks.get", "tasks.list", "safe.open"]})
    template["resources"][0]["spec"] |= spec
    await market.ok("POST", "/marketplace/templates", template, by=market.admin)


async def upgrade(market: Market, made: Any, **body: Any) -> Any:
    return await market.ok("POST", f"/marketplace/installations/{made['id']}/upgrade", body)


async def test_an_upgrade_gives_no_tool_that_the_caller_may_not_use(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=[*PLUGINS, SafePlugin])
    market = Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
    await newer(market, "1.0.0", enabled_tools=["tasks.get", "safe.open"])
    made = await market.install()
    agent = f"/agents/{objects(made)['sorter']['id']}"
    await newer(market, "1.1.0", enabled_tools=["tasks.get", "tasks.list", "safe.open"])
    result = await upgrade(market, made)
    assert [each["fields"] for each in result["updated"]] == [["enabled_tools"]]
    assert any("safe.open" in warning for warning in result["warnings"])
    assert (await market.ok("GET", agent))["enabled_tools"] == ["tasks.get", "tasks.list"]
    assert [each["edited"] for each in (await _created(market, made))] == [False] * 3


async def test_an_upgrade_leaves_an_agent_the_tools_that_it_has(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=[*PLUGINS, SafePlugin])
    market = Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
    await newer(market, "1.0.0", enabled_tools=["tasks.get", "safe.open"])
    former = await kit.as_user("admin", "former@example.org")
    made = await market.install(by=former)
    await newer(market, "1.1.0", enabled_tools=["safe.open"])
    await market.ok("PATCH", f"/admin/users/{former.user['id']}", {"role": "member"}, by=market.admin)
    market.member = await kit.sign_in(former.user["email"])
    assert (await upgrade(market, made))["warnings"] == []
    agent = await market.ok("GET", f"/agents/{objects(made)['sorter']['id']}")
    assert agent["enabled_tools"] == ["safe.open"]


async def test_a_field_that_has_the_value_of_the_template_again_is_not_edited(market: Market) -> None:
    await newer(market, "1.0.0", system_prompt="One.")
    made = await market.install()
    agent = f"/agents/{objects(made)['sorter']['id']}"
    await market.ok("PATCH", agent, {"system_prompt": "Mine."})
    await newer(market, "1.1.0", system_prompt="Two.")
    result = await upgrade(market, made)
    assert [each["values"][0]["new"] for each in result["kept_local"]] == ["Two."]
    await market.ok("PATCH", agent, {"system_prompt": "Two."})
    assert [each["edited"] for each in (await _created(market, made))] == [False] * 3
    await newer(market, "1.2.0", system_prompt="Three.")
    result = await upgrade(market, made)
    assert ([each["fields"] for each in result["updated"]], result["kept_local"]) == ([["system_prompt"]], [])
    assert (await market.ok("GET", agent))["system_prompt"] == "Three."


async def test_an_upgrade_restores_what_was_uninstalled(market: Market) -> None:
    await newer(market, "1.0.0")
    made = await market.install()
    await market.ok("PATCH", f"/agents/{objects(made)['sorter']['id']}", {"system_prompt": "Mine."})
    path = f"/marketplace/installations/{made['id']}"
    assert len((await market.ok("POST", f"{path}/uninstall", {}))["kept"]) == 1
    assert (await market.ok("GET", path))["status"] == "partly_removed"
    await newer(market, "1.1.0")
    result = await upgrade(market, made)
    assert [each["key"] for each in result["created"]] == ["main", "hook"]
    assert (await market.ok("GET", path))["status"] == "installed"


async def test_whoever_lost_the_right_to_write_objects_cannot_uninstall_them(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=[*PLUGINS, "notifications"])
    market = Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
    spec = {"name": "Tell", "events": ["task.failed"], "recipients": {"roles": ["admin"]}}
    template = manifest(resources=[{"kind": "notification_rule", "key": "rule", "spec": spec}])
    template["requires"]["plugins"] = ["notifications"]
    await market.ok("POST", "/marketplace/templates", template, by=market.admin)
    former = await kit.as_user("admin", "former@example.org")
    made = await market.install(by=former)
    answer = await market.admin.patch(f"/admin/users/{former.user['id']}", {"role": "member"})
    assert answer.status == 200, answer
    former = await kit.sign_in(former.user["email"])
    path = f"/marketplace/installations/{made['id']}"
    for refused in (
        await former.post(f"{path}/uninstall", {"dry_run": True}),
        await former.post(f"{path}/uninstall", {"force": True}),
        await former.delete(path),
    ):
        assert (refused.status, refused.code) == (403, "forbidden"), refused
    assert len((await market.ok("GET", "/notifications/rules", by=market.admin))["items"]) == 1
    await market.ok("POST", f"{path}/uninstall", {}, by=market.admin)
    assert (await market.ok("GET", "/notifications/rules", by=market.admin))["items"] == []


async def _created(market: Market, made: Any) -> list[Any]:
    found: list[Any] = (await market.ok("GET", f"/marketplace/installations/{made['id']}"))["created"]
    return found
