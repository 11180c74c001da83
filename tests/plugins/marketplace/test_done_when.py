"""What the page on the marketplace promises. The forms about the bundled templates are in test_bundled.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.plugins.marketplace.conftest import MANIFEST, PLUGINS, Market, manifest, objects, plugin_with

from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit, make_kernel
from corral_plugins.marketplace.service.manifests import sha256_of
from corral_plugins.tools.api import Tool


class SafePlugin(Plugin):
    """Safe: contributes a tool for which members lack a permission."""

    name = "safe"
    wants = ("tools",)

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        schema = {"type": "object"}
        return [
            Tool(
                name="safe.open",
                title="Open the safe",
                description="Opens it.",
                risk="read",
                schema=schema,
                permission="agents.manage",
                run=lambda context, arguments: None,
            )
        ]


async def _other_market(make_kit: Callable[..., Any], *plugins: Any) -> Market:
    kit: Kit = await make_kit(plugins=(*PLUGINS, *plugins))
    return Market(kit, await kit.as_user("member"), await kit.as_user("admin"))


async def test_marketplace_2_a_failing_resource_leaves_no_row(market: Market) -> None:
    wrong = copy.deepcopy(MANIFEST["resources"])
    wrong[2]["spec"]["action"]["workflow_id"] = "01890a5d-ac96-774b-bcce-b302099a8057"  # no such workflow
    await market.upload(resources=wrong)
    refused = await market.refused()
    assert (refused.status, refused.code) == (422, "unknown_reference")
    assert refused.json()["errors"][0]["pointer"] == "/resources/2/spec/action/workflow_id"
    assert await market.names() == {"agent": set(), "workflow": set(), "trigger": set()}
    assert (await market.ok("GET", "/marketplace/installations"))["total"] == 0
    assert [e.type for e in await market.kit.events() if e.type.startswith(("agent.", "workflow.", "template."))] == []
    await market.upload(version="1.0.1")
    made = await market.install()
    assert [each["name"] for each in made["created"]] == ["Sorter", "Sort", "Something arrived"]


async def test_marketplace_3_the_dry_run_names_exactly_what_is_created(market: Market) -> None:
    await market.upload()
    await market.install(name_prefix="Night ")
    bodies: tuple[dict[str, Any], ...] = (
        {},
        {"name_prefix": "Night "},
        {"on_conflict": "skip", "name_prefix": "Night "},
    )
    for body in bodies:
        before = await market.names()
        plan = await market.install(**body, dry_run=True)
        assert await market.names() == before
        made = await market.install(**body)
        planned = [(each["kind"], each["key"], each["name"], each["action"] == "reuse") for each in plan["objects"]]
        assert planned == [(each["kind"], each["key"], each["name"], each["reused"]) for each in made["created"]]
        assert (plan["missing"], plan["warnings"]) == (made["missing"], made["warnings"])
    assert (await market.ok("GET", "/marketplace/installations"))["total"] == 4


async def test_marketplace_4_a_changed_byte_makes_a_template_not_installable(make_kit: Callable[..., Any]) -> None:
    good = {**MANIFEST, "sha256": sha256_of(MANIFEST)}
    bad = json.dumps({**good, "slug": "changed", "sha256": good["sha256"]}).encode()
    market = await _other_market(make_kit, plugin_with(json.dumps(good).encode(), bad))
    found = await market.ok("GET", "/marketplace/templates/changed")
    assert (found["installable"], found["source"]) == (False, "plugin:shelf")
    assert [each["code"] for each in found["problems"]] == ["marketplace.wrong_hash"]
    refused = await market.refused("changed")
    assert (refused.status, refused.json()["errors"][0]["code"]) == (422, "marketplace.wrong_hash")
    assert (await market.ok("GET", "/marketplace/templates/sorter"))["installable"]
    wrong = await market.admin.post("/marketplace/templates", manifest(sha256="0" * 64))
    assert (wrong.status, wrong.json()["errors"][0]["code"]) == (422, "marketplace.wrong_hash")


async def test_marketplace_5_an_exported_team_runs_elsewhere(market: Market, tmp_path: Path) -> None:
    agent = await market.ok("POST", "/agents", {"name": "Writer", "system_prompt": "You write."})
    steps = [
        {"name": "write", "step_type": "agent", "agent_id": agent["id"], "config": {"instructions": "Write."}},
        {"name": "out", "step_type": "transform", "config": {"value": "{{ input.n }}"}},
    ]
    workflow = await market.ok("POST", "/workflows", {"name": "Write", "steps": steps})
    body = {
        "agent_ids": [agent["id"]],
        "workflow_ids": [workflow["id"]],
        "meta": {"slug": "my-writer", "name": "My writer", "version": "2.0.0"},
    }
    exported = await market.ok("POST", "/marketplace/export", body)
    assert agent["id"] not in json.dumps(exported)
    assert exported["resources"][1]["spec"]["steps"][0]["agent_id"] == {"$ref": "writer"}
    alone = await market.member.post("/marketplace/export", {**body, "agent_ids": []})
    assert (alone.status, alone.json()["errors"][0]["code"]) == (422, "unknown_reference")
    async with make_kernel(tmp_path / "elsewhere", plugins=PLUGINS) as kit:
        other = Market(kit, await kit.as_user("member"), await kit.as_user("admin"))
        await other.ok("POST", "/marketplace/templates", exported, by=other.admin)
        made = objects(await other.install("my-writer"))
        plan = await other.ok("POST", f"/workflows/{made['write']['id']}/run", {"input": {"n": 7}, "dry_run": True})
        assert [each["name"] for each in plan["plan"]] == ["write", "out"]
        run = await other.ok("POST", f"/workflows/{made['write']['id']}/run", {"input": {"n": 7}})
        await other.settle()
        started = {each["name"]: each for each in (await other.ok("GET", f"/workflow-runs/{run['id']}"))["steps"]}
        task = await other.ok("GET", f"/tasks/{started['write']['task_id']}")
        assert (task["agent_id"], task["instructions"]) == (made["writer"]["id"], "Write.")
    token = "ghp_" + "a1B2" * 9
    await market.ok("PATCH", f"/agents/{agent['id']}", {"system_prompt": f"Use {token}."})
    refused = await market.member.post("/marketplace/export", body)
    assert (refused.status, refused.json()["errors"][0]["code"]) == (422, "marketplace.credential")
    assert token not in refused.body.decode()


async def test_marketplace_6_an_edited_prompt_survives(market: Market) -> None:
    await market.upload()
    made = await market.install()
    agent_id, installation = objects(made)["sorter"]["id"], made["id"]
    await market.ok("PATCH", f"/agents/{agent_id}", {"system_prompt": "Mine."})
    newer = manifest(version="1.1.0", changes="Better.")
    newer["resources"][0]["spec"] |= {"system_prompt": "You sort better.", "description": "Sorts better."}
    await market.ok("POST", "/marketplace/templates", newer, by=market.admin)
    shown = await market.ok("GET", f"/marketplace/installations/{installation}")
    assert (shown["version_available"], objects(shown)["sorter"]["edited"]) == ("1.1.0", True)
    path = f"/marketplace/installations/{installation}"
    plan = await market.ok("POST", f"{path}/upgrade", {"dry_run": True})
    assert (await market.ok("GET", path))["version"] == "1.0.0"
    result = await market.ok("POST", f"{path}/upgrade", {})
    assert result == plan
    assert [(each["key"], each["fields"]) for each in result["updated"]] == [("sorter", ["description"])]
    assert [(each["key"], each["fields"]) for each in result["kept_local"]] == [("sorter", ["system_prompt"])]
    installed = "You sort. Look for: urgent mail."
    values = {"field": "system_prompt", "installed": installed, "new": "You sort better.", "current": "Mine."}
    assert result["kept_local"][0]["values"] == [values]
    agent = await market.ok("GET", f"/agents/{agent_id}")
    assert (agent["system_prompt"], agent["description"]) == ("Mine.", "Sorts better.")
    assert (await market.member.post(f"{path}/upgrade", {})).code == "invalid_state"
    gone = await market.ok("POST", f"{path}/uninstall", {})
    assert [(each["key"], each["reason"]) for each in gone["kept"]] == [("sorter", "edited")]
    assert [each["key"] for each in gone["removed"]] == ["hook", "main"]
    assert await market.names() == {"agent": {"Sorter"}, "workflow": set(), "trigger": set()}
    assert (await market.ok("GET", path))["status"] == "partly_removed"
    forced = await market.ok("POST", f"{path}/uninstall", {"force": True})
    assert [each["key"] for each in forced["removed"]] == ["sorter"]
    assert (await market.ok("GET", path))["status"] == "removed"


async def test_marketplace_7_a_member_gains_nothing(market: Market) -> None:
    refused = await market.member.post("/marketplace/templates", manifest())
    assert (refused.status, refused.code) == (403, "forbidden")
    dangerous = manifest(slug="risky", permissions={"tools": ["http.request"], "egress": ["*"]})
    dangerous["resources"] = dangerous["resources"][:1]
    spec = {"enabled_tools": ["http.request"], "tool_policy": {"http.request": "allow"}}
    dangerous["resources"][0]["spec"] |= spec
    shown = await market.ok("POST", "/marketplace/templates", dangerous, by=market.admin)
    assert [each["severity"] for each in shown["findings"]] == ["critical"]
    refused = await market.refused("risky")
    assert (refused.status, refused.json()["errors"][0]["code"]) == (403, "marketplace.unasked_tool")
    refused = await market.refused("risky", dry_run=True)
    assert refused.status == 403
    await market.install("risky", by=market.admin)


async def test_marketplace_7_a_member_gains_no_tool_they_may_not_use(make_kit: Callable[..., Any]) -> None:
    market = await _other_market(make_kit, SafePlugin)
    more = manifest(permissions={"tools": ["tasks.get", "safe.open"]})
    more["resources"][0]["spec"]["enabled_tools"] = ["tasks.get", "safe.open"]
    await market.ok("POST", "/marketplace/templates", more, by=market.admin)
    plan = await market.install(dry_run=True)
    assert plan["tools"] == {"granted": ["tasks.get"], "refused": ["safe.open"]}
    made = await market.install()
    agent = await market.ok("GET", f"/agents/{objects(made)['sorter']['id']}")
    assert agent["enabled_tools"] == ["tasks.get"]
    assert any("safe.open" in warning for warning in made["warnings"])
    by_admin = await market.install(by=market.admin)
    agent = await market.ok("GET", f"/agents/{objects(by_admin)['sorter']['id']}")
    assert agent["enabled_tools"] == ["tasks.get", "safe.open"]
