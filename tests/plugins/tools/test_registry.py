"""The registry over HTTP: visibility of tools, changes by admins, and the tools that people may give to agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.tools.conftest import World

pytestmark = pytest.mark.one_engine


async def test_the_list_is_by_name_and_filtered(world: World) -> None:
    reader = await world.kit.as_user("viewer")

    async def names(query: str) -> list[str]:
        answer = await reader.get(f"/tools?limit=200&{query}")
        assert answer.status == 200, answer
        return [tool["name"] for tool in answer.json()["items"]]

    everything = await names("")
    assert everything == sorted(everything)
    assert {"http.fetch", "http.request", "human.ask", "shell.run", "tasks.get", "test.write"} <= set(everything)
    assert await names("source=plugin:tools") == ["http.fetch", "http.request"]
    assert await names("risk=dangerous&source=plugin:workers") == ["python.run", "shell.run"]
    assert "shell.run" in await names("runs=worker")
    assert "http.fetch" not in await names("runs=worker")
    page = (await reader.get("/tools?limit=2&offset=1")).json()
    assert ([tool["name"] for tool in page["items"]], page["total"]) == (everything[1:3], len(everything))
    assert (await reader.get("/tools/no.such")).status == 404
    auditor = await world.kit.as_user("auditor")
    assert (await auditor.get("/tools")).status == 403


async def test_the_policy_for_an_agent(world: World) -> None:
    policy = {"test.write": "deny", "test.page": {"policy": "ask", "when_tainted": "deny"}}
    agent_id = await world.agent("test.*", tool_policy=policy)
    found = (await world.member.get(f"/tools?limit=200&agent_id={agent_id}")).json()["items"]
    policies = {tool["name"]: tool["policy"] for tool in found}
    assert policies["test.write"] == "deny"
    assert policies["test.page"] == "ask"
    assert policies["test.read"] == "allow"
    assert policies["test.danger"] == "ask"
    assert policies["http.fetch"] == "deny"
    assert (await world.member.get("/tools/test.write")).json()["policy"] is None
    assert (await world.member.get(f"/tools?agent_id={world.worker_id}")).code == "unknown_reference"


async def test_an_admin_changes_a_tool_and_takes_it_back(world: World) -> None:
    before = (await world.member.get("/tools/test.write")).json()
    change = {"default_policy": "deny", "risk": "external", "timeout_seconds": 7}
    answer = await world.admin.patch("/tools/test.write", change, headers={"If-Match": '"1"'})
    assert answer.status == 200, answer
    assert answer.json() == before | change | {"version": 2}
    assert answer.headers["etag"] == '"2"'
    stale = await world.admin.patch("/tools/test.write", change, headers={"If-Match": '"1"'})
    assert (stale.status, stale.code) == (412, "precondition_failed")
    assert (await world.admin.patch("/tools/test.write", {})).json()["version"] == 2
    back = await world.admin.patch("/tools/test.write", dict.fromkeys(change))
    assert back.json() == before | {"version": 3}
    assert (await world.member.patch("/tools/test.write", change)).status == 403


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("name", "change", "pointer"),
    [
        ("test.page", {"risk": "write"}, "/risk"),
        ("test.write", {"config": {"x": 1}}, "/config/x"),
        ("http.fetch", {"config": {"hosts": [7]}}, "/config/hosts/0"),
        ("test.write", {"timeout_seconds": 601}, "/timeout_seconds"),
        ("test.write", {"name": "x"}, "/name"),
    ],
)
async def test_what_cannot_be_changed(world: World, name: str, change: dict[str, Any], pointer: str) -> None:
    answer = await world.admin.patch(f"/tools/{name}", change)
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_changes_hold_at_once(world: World) -> None:
    run = await world.run("test.*")
    await world.admin.patch("/tools/test.write", {"enabled": False})
    assert (await run.say("test.write")).json()["reason"] == "disabled"
    await world.admin.patch("/tools/test.write", {"enabled": True, "risk": "dangerous"})
    assert (await run.say("test.write")).json()["reason"] == "policy"
    await world.admin.patch("/tools/test.write", {"default_policy": "allow"})
    assert (await run.say("test.write")).status == 200


async def test_a_claim_offers_what_may_be_called(world: World) -> None:
    policy = {"test.fail": "deny", "test.danger": "ask"}
    run = await world.run(
        "test.*", task={"allowed_tools": ["test.write", "test.fail", "test.danger"]}, tool_policy=policy
    )
    tools = run.claim["agent"]["tools"]
    assert [(tool["name"], tool["policy"]) for tool in tools] == [("test.danger", "ask"), ("test.write", "allow")]
    assert set(tools[0]) == {"name", "title", "description", "schema", "risk", "runs", "policy"}


async def test_check_is_for_the_agent_s_owner(world: World) -> None:
    agent_id = await world.agent("test.*")
    body = {"agent_id": agent_id, "arguments": {"text": "x"}}
    path = "/tools/test.page/check"
    assert (await world.member.post(path, body)).json() == {"decision": "allowed", "reasons": [], "errors": []}
    tainted = (await world.member.post(path, {**body, "tainted": True})).json()
    assert (tainted["decision"], tainted["reasons"]) == ("denied", ["policy"])
    wrong = (await world.member.post(path, {**body, "arguments": []})).json()
    assert (wrong["reasons"], wrong["errors"][0]["pointer"]) == (["invalid_arguments"], "/arguments")
    other = await world.kit.as_user("member")
    assert (await other.post(path, body)).status == 403
    assert (await world.member.post("/tools/no.such/check", body)).status == 404
    for field in ("agent_id", "task_id"):
        answer = await world.member.post(path, {**body, field: world.worker_id})
        assert (answer.code, answer.json()["errors"][0]["pointer"]) == ("unknown_reference", f"/{field}")
    assert world.bench.runs == []


async def test_nobody_gives_away_what_they_may_not_use(world: World) -> None:
    agent_id = await world.agent("test.read")
    loosened = {"tool_policy": {"test.danger": "allow"}}
    for change in (loosened, {"tool_policy": {"test.*": "allow"}}, {"tool_policy": {"what.ever": {"policy": "allow"}}}):
        assert (await world.member.patch(f"/agents/{agent_id}", change)).status == 403, change
    assert (await world.member.patch(f"/agents/{agent_id}", {"tool_policy": {"test.page": "allow"}})).status == 200
    assert (await world.admin.patch(f"/agents/{agent_id}", loosened)).status == 200
    kept = await world.member.patch(f"/agents/{agent_id}", {**loosened, "system_prompt": "new"})
    assert kept.status == 200, kept
    more = await world.member.patch(f"/agents/{agent_id}", {"enabled_tools": ["test.*", "http.*"]})
    assert more.status == 200, more


async def test_metrics_name_the_tools_of_plugins(world: World) -> None:
    run = await world.run("test.*")
    await run.say("test.write")
    await run.say("test.page")
    await run.tool("no.such")
    text = (await world.kit.client.get("/metrics", root=True)).body.decode()
    assert 'corral_tool_calls_total{decision="allowed",tool="test.write"} 1.0' in text
    assert 'corral_tool_calls_total{decision="denied",tool="other"} 1.0' in text
    assert 'corral_tool_seconds_count{tool="test.write"} 1.0' in text
    assert "corral_tainted_attempts_total 1.0" in text


async def test_taint_that_is_switched_off_is_told_and_asks_nothing(make_kit: Callable[..., Any]) -> None:
    world = await World().build(make_kit, config={"settings.tools.taint_enabled": False})
    run = await world.run("test.*")
    assert (await run.say("test.page")).json()["tainted"] is True
    assert (await run.say("test.page")).status == 200
    (check,) = world.kit.loaded("tools").contributions_to("corral_health_checks")
    assert check.check()[0] == "degraded"


async def test_agents_are_warned_of_tools_that_nobody_brings(world: World) -> None:
    told = {"tools": ["shell.run"]}
    assert (await world.worker.post(f"/workers/{world.worker_id}/heartbeat", told)).status == 200
    agent_id = await world.agent("http.fetch", "tasks.*", "shell.run", "python.run", "what.ever")
    warnings = (await world.member.get(f"/agents/{agent_id}")).json()["warnings"]
    assert [each for each in warnings if each.startswith("tool")] == [
        "tool_unavailable:python.run",
        "tool_unavailable:what.ever",
    ]
