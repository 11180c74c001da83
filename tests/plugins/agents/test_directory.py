"""The directory over HTTP: create, list, change, copy, take back, delete."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import pytest

from corral.testing.kit import Client, Kit

NOBODY = "01900000-0000-7000-8000-000000000000"


async def create(client: Client, name: str = "Ada", **fields: Any) -> dict[str, Any]:
    answer = await client.post("/agents", {"name": name, **fields})
    assert answer.status == 201, answer
    view: dict[str, Any] = answer.json()
    return view


@pytest.mark.one_engine
async def test_a_name_is_enough(alice: Client) -> None:
    answer = await alice.post("/agents", {"name": "  Ada  "})
    assert answer.status == 201, answer
    agent = answer.json()
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["location"] == f"/api/v1/agents/{agent['id']}"
    assert (agent["name"], agent["status"], agent["role"]) == ("Ada", "offline", "general")
    assert (agent["version"], agent["config_version"], agent["warnings"]) == (1, 1, [])
    assert agent["config"] == {
        "temperature": None,
        "max_tokens": None,
        "max_steps": 25,
        "fallback_models": [],
        "output_schema": None,
        "memory": True,
        "knowledge": True,
    }
    assert agent["review_policy"] == {"mode": "none", "reviewer_agent_id": None}
    assert (agent["monthly_budget_usd"], agent["retry_policy"], agent["spent_month_usd"]) == (None, None, None)
    assert (await alice.get(f"/agents/{agent['id']}")).json() == agent


async def test_every_field_comes_back(alice: Client) -> None:
    fields: dict[str, Any] = {
        "description": "d",
        "role": "writer",
        "llm_provider": "openai",
        "llm_model": "gpt",
        "system_prompt": "Be brief.",
        "enabled_tools": ["knowledge.search", "mcp.github.*"],
        "tool_policy": {"http.fetch": "ask", "ssh.execute": {"policy": "deny", "config": {"hosts": ["a"]}}},
        "worker_selector": {"group": "gpu", "labels": {"zone": "A"}},
        "config": {"temperature": 0.5, "max_steps": 7, "output_schema": {"type": "object"}},
        "max_concurrent_tasks": 3,
        "retry_policy": {"max_attempts": 5},
        "stall_policy": {"stall_seconds": 60},
        "tags": ["a", "b"],
        "metadata": {"k": [1]},
    }
    agent = await create(alice, **fields)
    for field in fields.keys() - {"config"}:
        assert agent[field] == fields[field], field
    assert agent["config"]["max_steps"] == 7
    assert agent["config"]["memory"] is True


@pytest.mark.one_engine
async def test_what_is_wrong_is_told_where(alice: Client) -> None:
    cases = [
        ({"name": ""}, "/name", "too_short"),
        ({"name": "   "}, "/name", "too_short"),
        ({"name": "a", "status": "idle"}, "/status", "unknown_field"),
        ({"name": "a", "enabled_tools": ["Shell"]}, "/enabled_tools/0", "bad_format"),
        ({"name": "a", "enabled_tools": ["*"]}, "/enabled_tools/0", "bad_format"),
        ({"name": "a", "config": {"max_steps": 201}}, "/config/max_steps", "too_large"),
        ({"name": "a", "config": {"output_schema": {"type": 5}}}, "/config/output_schema/type", None),
        ({"name": "a", "monthly_budget_usd": -1}, "/monthly_budget_usd", "too_small"),
        ({"name": "a", "retry_policy": {"max_attempts": None}}, "/retry_policy/max_attempts", "wrong_type"),
        ({"name": "a", "review_policy": {"mode": "agent"}}, "/review_policy/mode", "not_allowed"),
        ({"name": "a", "metadata": {"k": "x" * 16384}}, "/metadata", "too_long"),
        ({"name": "a", "worker_id": NOBODY}, "/worker_id", "unknown_reference"),
    ]
    for body, pointer, code in cases:
        answer = await alice.post("/agents", body)
        assert answer.status == 422, (body, answer)
        (fault,) = answer.json()["errors"]
        assert fault["pointer"] == pointer, (body, answer)
        assert code in (None, fault["code"]), (body, answer)


async def test_names_are_unique_whatever_the_case_and_free_again_after_deletion(alice: Client) -> None:
    agent = await create(alice, "Straße")
    answer = await alice.post("/agents", {"name": "STRASSE"})
    assert (answer.status, answer.code, answer.json()["existing_id"]) == (409, "duplicate", agent["id"])
    other = await create(alice, "Other")
    answer = await alice.patch(f"/agents/{other['id']}", {"name": "strasse"})
    assert (answer.status, answer.json()["existing_id"]) == (409, agent["id"])
    assert (await alice.patch(f"/agents/{agent['id']}", {"name": "STRASSE"})).status == 200
    answer = await alice.delete(f"/agents/{agent['id']}")
    assert (answer.status, answer.headers["corral-affected"]) == (204, "tasks=0")
    assert (await alice.get(f"/agents/{agent['id']}")).status == 404
    assert (await alice.delete(f"/agents/{agent['id']}")).status == 404
    await create(alice, "strasse")


@pytest.mark.one_engine
async def test_the_quota_of_agents(make_kit: Any) -> None:
    kit = await make_kit(plugins=["agents"], config={"settings.agents.max_agents": 1})
    alice = await kit.as_user("member")
    await create(alice)
    answer = await alice.post("/agents", {"name": "Bea"})
    assert (answer.status, answer.code) == (429, "quota_exceeded")
    assert "retry-after" not in answer.headers


async def test_list_filters_and_orders(alice: Client) -> None:
    zoe = await create(alice, "Zoe", role="writer", tags=["x"], description="Writes POEMS")
    bob = await create(alice, "bob", tags=["x%", "y"])
    eve = await create(alice, "Eve_1")
    await alice.post(f"/agents/{bob['id']}/start")

    async def names(query: str) -> list[str]:
        answer = await alice.get(f"/agents{query}")
        assert answer.status == 200, answer
        return [item["name"] for item in answer.json()["items"]]

    assert await names("") == ["Eve_1", "bob", "Zoe"]
    assert await names("?sort=name") == ["bob", "Eve_1", "Zoe"]
    assert set(await names("?sort=last_active")) == {"Eve_1", "bob", "Zoe"}
    assert await names("?status_filter=idle") == ["bob"]
    assert await names("?status=idle&status=busy") == ["bob"]
    assert await names("?role=writer") == ["Zoe"]
    assert await names("?tag=x") == ["Zoe"]
    assert await names("?tag=x&tag=y") == ["bob", "Zoe"]
    assert await names("?search=poems") == ["Zoe"]
    assert await names("?search=e_1") == ["Eve_1"]
    assert await names("?search=b_b") == []
    assert await names(f"?worker_id={NOBODY}") == []
    assert (await alice.get("/agents?status=running")).status == 422
    first = (await alice.get("/agents?limit=2")).json()
    assert (first["total"], [item["id"] for item in first["items"]]) == (3, [eve["id"], bob["id"]])
    rest = (await alice.get(f"/agents?limit=2&cursor={first['next']}")).json()
    assert [item["id"] for item in rest["items"]] == [zoe["id"]]


async def test_changes_of_configuration_make_versions(kit: Kit, alice: Client, payloads: Any) -> None:
    agent = await create(alice, system_prompt="one")
    path = f"/agents/{agent['id']}"
    same = (await alice.patch(path, {"system_prompt": "one"})).json()
    assert (same["version"], same["config_version"]) == (1, 1)
    tagged = (await alice.patch(path, {"tags": ["t"], "description": "d"})).json()
    assert (tagged["version"], tagged["config_version"]) == (2, 1)
    second = (await alice.patch(path, {"system_prompt": "two", "config": {"temperature": 1}})).json()
    assert (second["version"], second["config_version"]) == (3, 2)
    assert second["config"]["max_steps"] == 25
    listed = (await alice.get(f"{path}/versions")).json()
    assert [item["n"] for item in listed["items"]] == [2, 1]
    assert listed["items"][0]["changed_fields"] == ["config", "system_prompt"]
    assert listed["items"][0]["by"] == agent["created_by"]
    assert listed["items"][0]["attempts"] is None
    old = (await alice.get(f"{path}/versions/1")).json()
    assert old["configuration"]["system_prompt"] == "one"
    assert (await alice.get(f"{path}/versions/3")).status == 404
    assert (await alice.get(f"{path}/versions/x")).status == 404
    compared = (await alice.get(f"{path}/versions/compare?from=1&to=2")).json()
    assert [item["field"] for item in compared["diff"]] == ["config", "system_prompt"]
    assert compared["diff"][1] == {"field": "system_prompt", "from": "one", "to": "two"}
    assert compared["stats"] == {"from": None, "to": None}
    assert (await alice.get(f"{path}/versions/compare?from=1")).status == 422
    assert (await alice.get(f"{path}/versions/compare?from=1&to=9")).status == 404
    back = (await alice.post(f"{path}/rollback", {"version": 1})).json()
    assert (back["config_version"], back["system_prompt"], back["config"]["temperature"]) == (3, "one", None)
    assert back["tags"] == ["t"]
    assert (await alice.post(f"{path}/rollback", {"version": 1})).code == "invalid_state"
    assert (await alice.post(f"{path}/rollback", {"version": 9})).status == 404
    updates = await payloads(kit, "agent.updated")
    assert [item["version"] for item in updates] == [1, 2, 3]
    assert updates[0]["changed_fields"] == ["description", "tags"]


@pytest.mark.one_engine
async def test_if_match_guards_changes(alice: Client) -> None:
    agent = await create(alice)
    path = f"/agents/{agent['id']}"
    stale = {"if-match": '"7"'}
    for answer in (
        await alice.patch(path, {"description": "x"}, headers=stale),
        await alice.delete(path, headers=stale),
        await alice.post(f"{path}/start", headers=stale),
        await alice.post(f"{path}/rollback", {"version": 1}, headers=stale),
    ):
        assert (answer.status, answer.json()["current_version"]) == (412, 1)
    assert (await alice.patch(path, {"description": "x"}, headers={"if-match": '"1"'})).json()["version"] == 2


async def test_parallel_changes_are_all_kept(alice: Client) -> None:
    agent = await create(alice)
    path = f"/agents/{agent['id']}"
    bodies: list[dict[str, Any]] = [{"description": "d"}, {"system_prompt": "p"}, {"llm_model": "m"}, {"tags": ["t"]}]
    answers = await asyncio.gather(*(alice.patch(path, body) for body in bodies))
    assert {answer.status for answer in answers} == {200}
    after = (await alice.get(path)).json()
    assert (after["version"], after["config_version"]) == (5, 3)
    assert (after["description"], after["system_prompt"], after["llm_model"], after["tags"]) == ("d", "p", "m", ["t"])


async def test_a_copy_is_the_callers_and_offline(kit: Kit, alice: Client) -> None:
    agent = await create(
        alice, system_prompt="p", tags=["t"], stall_policy={"action": "cancel"}, worker_selector={"group": "g"}
    )
    await alice.post(f"/agents/{agent['id']}/start")
    bob = await kit.as_user("member")
    answer = await bob.post(f"/agents/{agent['id']}/clone", {"name": "Copy"})
    copy = answer.json()
    assert (answer.status, answer.headers["location"]) == (201, f"/api/v1/agents/{copy['id']}")
    assert (copy["status"], copy["created_by"], copy["config_version"]) == ("offline", bob.user["id"], 1)
    for field in ("system_prompt", "tags", "stall_policy", "worker_selector", "config"):
        assert copy[field] == agent[field]
    assert (await bob.post(f"/agents/{agent['id']}/clone", {"name": "ADA"})).code == "duplicate"


@pytest.mark.one_engine
async def test_others_read_and_do_not_write(kit: Kit, alice: Client) -> None:
    agent = await create(alice)
    path = f"/agents/{agent['id']}"
    bob, viewer, auditor = await kit.as_user("member"), await kit.as_user("viewer"), await kit.as_user("auditor")
    for client in (bob, viewer):
        for reading in ("", "/versions", "/versions/1", "/stats"):
            assert (await client.get(path + reading)).status == 200
        refused = [
            await client.patch(path, {"description": "x"}),
            await client.delete(path),
            await client.post(f"{path}/start"),
            await client.post(f"{path}/stop"),
            await client.post(f"{path}/pause"),
            await client.post(f"{path}/resume"),
            await client.post(f"{path}/rollback", {"version": 1}),
            await client.get(f"{path}/tokens"),
            await client.post(f"{path}/tokens", {"name": "t"}),
        ]
        assert {answer.status for answer in refused} == {403}
    assert (await viewer.post("/agents", {"name": "V"})).status == 403
    assert (await auditor.get(path)).status == 403
    assert (await kit.client.get(path)).status == 401
    assert (await alice.get(f"/agents/{NOBODY}")).status == 404


@pytest.mark.one_engine
async def test_stats_without_anybody_who_keeps_attempts_are_unknown(alice: Client) -> None:
    agent = await create(alice)
    stats = (await alice.get(f"/agents/{agent['id']}/stats?days=7")).json()
    assert stats.pop("days") == 7
    assert set(stats.values()) == {None}


async def test_deleted_agents_are_purged_after_thirty_days(kit: Kit, alice: Client) -> None:
    from corral import clock
    from corral_plugins.agents import jobs
    from corral_plugins.agents.models import Agent, AgentVersion

    agent, kept = await create(alice), await create(alice, "Kept")
    await alice.delete(f"/agents/{agent['id']}")
    work = kit.kernel.database.work
    assert await work(jobs.purge_one_batch) == 0
    clock.travel(datetime.timedelta(days=31).total_seconds())
    await jobs.purge_deleted_agents(work)
    assert await work(lambda: [row.id for row in Agent.select()], read=True) == [kept["id"]]
    assert await work(lambda: [row.agent_id for row in AgentVersion.select()], read=True) == [kept["id"]]
