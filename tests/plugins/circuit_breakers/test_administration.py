"""What admins do with breakers, over HTTP: list, configure, force, reset, delete; settings, audit and rights."""

from __future__ import annotations

import pytest
from tests.plugins.circuit_breakers.conftest import NAME, Panel, is_rejected

from corral import clock
from corral_plugins.circuit_breakers.models import TransitionRow


async def test_circuit_breakers_7_one_field_changes_and_members_are_refused(panel: Panel) -> None:
    made = await panel.configure("custom", description="a", failure_rate_threshold=20, minimum_calls=5)
    assert (made["source"], made["guarded"], made["state"], made["version"]) == ("configured", False, "closed", 2)
    changed = await panel.configure("custom", status=200, minimum_calls=6)
    different = {key for key in made if made[key] != changed[key]}
    assert different == {"minimum_calls", "version"}
    assert (await panel.get("custom"))["description"] == "a"
    member = await panel.kit.as_user("member")
    for method, path, body in (
        ("GET", "", None),
        ("POST", "", {"name": "custom"}),
        ("GET", "/custom", None),
        ("DELETE", "/custom", None),
        ("POST", "/custom/force-open", {}),
        ("POST", "/custom/force-close", {}),
        ("POST", "/custom/reset", None),
    ):
        assert (await member.request(method, f"/circuit-breakers{path}", body)).status == 403


@pytest.mark.one_engine
async def test_a_guarded_target_exists_before_its_first_call(panel: Panel) -> None:
    panel.breakers.declare("llm", lambda: ["llm:openai"], slow_call_seconds=120)
    found = await panel.get("llm%3Aopenai")
    assert (found["name"], found["guarded"], found["source"]) == ("llm:openai", True, "default")
    assert (found["slow_call_duration_seconds"], found["minimum_calls"], found["generation"]) == (120, 10, 1)
    assert (await panel.admin.get("/circuit-breakers/llm:unknown")).status == 404
    assert (await panel.admin.post("/circuit-breakers/nothing/reset")).status == 404
    assert (await panel.admin.post("/circuit-breakers/Not%20a%20name/force-open", {})).status == 404
    assert (await panel.act("force-open", "llm:openai"))["state"] == "open"
    assert (await panel.get("http:any.host"))["guarded"] is True


async def test_lists_are_by_name_and_filtered(panel: Panel) -> None:
    panel.breakers.declare("llm", lambda: ["llm:b", "llm:a"])
    await panel.configure("zeta")
    await panel.fails(10)
    await panel.sync()

    async def names(query: str = "") -> list[str]:
        answer = await panel.admin.get(f"/circuit-breakers{query}")
        assert answer.status == 200, answer
        return [each["name"] for each in answer.json()["items"]]

    assert await names() == [NAME, "llm:a", "llm:b", "zeta"]
    assert await names("?state=open") == [NAME]
    assert await names("?state=closed&state=half_open&prefix=llm:") == ["llm:a", "llm:b"]
    assert await names("?guarded=false") == ["zeta"]
    assert await names("?guarded=true&limit=1&offset=1") == ["llm:a"]
    assert (await panel.admin.get("/circuit-breakers?state=ajar")).status == 422


@pytest.mark.one_engine
async def test_windows_must_hold_the_minimum_of_calls(panel: Panel) -> None:
    for fields, pointer in (
        ({"minimum_calls": 21}, "/minimum_calls"),
        ({"window_size": 2000}, "/window_size"),
        ({"window_size": 5, "minimum_calls": 6}, "/minimum_calls"),
        ({"minimum_calls": 0}, "/minimum_calls"),
        ({"name": "Not A Name"}, "/name"),
        ({"unknown": 1}, "/unknown"),
    ):
        refused = await panel.admin.post("/circuit-breakers", {"name": NAME, **fields})
        assert (refused.status, [each["pointer"] for each in refused.json()["errors"]]) == (422, [pointer])
    await panel.configure(status=200, window_type="time", window_size=3600, minimum_calls=1000)


@pytest.mark.one_engine
async def test_configuration_applies_at_the_next_call_and_a_new_window_is_empty(panel: Panel) -> None:
    await panel.fails(4)
    assert (await panel.configure(status=200, minimum_calls=5))["counts"]["calls"] == 0  # reported a moment later
    await panel.fails(1)
    assert is_rejected(await panel.call())
    await panel.act("reset")
    await panel.fails(3)
    await panel.sync()
    assert (await panel.configure(status=200, window_size=50))["counts"]["calls"] == 0
    await panel.fails(4)
    assert (await panel.get())["state"] == "closed"


@pytest.mark.one_engine
async def test_a_disabled_breaker_passes_everything_and_counts(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    assert (await panel.configure(status=200, enabled=False))["state"] == "closed"
    await panel.fails(15)
    found = await panel.get()
    assert (found["state"], found["counts"]["failures"]) == ("closed", 15)
    refused = await panel.admin.post(f"/circuit-breakers/{NAME}/force-open", {})
    assert (refused.status, refused.json()["current_status"]) == (409, "disabled")


@pytest.mark.one_engine
async def test_settings_are_the_defaults(panel: Panel) -> None:
    values = {"minimum_calls": 4, "wait_open_seconds": 5}
    for key, value in values.items():
        answer = await panel.admin.put(f"/settings/circuit_breakers/{key}", {"value": value})
        assert answer.status == 200, answer
    await panel.sync()
    await panel.fails(4)
    assert is_rejected(await panel.call())
    await panel.sync()
    clock.travel(6)
    assert await panel.call() == "fine"
    refused = await panel.admin.put("/settings/circuit_breakers/window_size", {"value": 3})
    assert refused.status == 422, refused


async def test_forced_states(panel: Panel) -> None:
    opened = await panel.act("force-open", reason="maintenance")
    assert (opened["state"], opened["forced"], opened["retry_at"]) == ("open", True, None)
    rejected = await panel.call()
    assert is_rejected(rejected)
    assert rejected.headers["Retry-After"] == "60"
    clock.travel(500)
    await panel.kit.run_schedule("circuit_breakers.sweep")
    assert is_rejected(await panel.call())
    again = await panel.act("force-open")
    assert (again["generation"], again["reason"]) == (opened["generation"], "maintenance")
    assert (await panel.act("force-open", reason="much longer"))["reason"] == "much longer"
    assert is_rejected(await panel.call())
    closed = await panel.act("force-close", reason="done")
    assert (closed["state"], closed["forced"], closed["counts"]["calls"]) == ("closed", False, 0)
    await panel.fails(10)
    assert is_rejected(await panel.call())  # force-close does not stick
    await panel.sync()
    assert (await panel.act("reset"))["state"] == "closed"
    transitions = (await panel.get())["transitions"]
    by_admin = [each for each in transitions if each["by"] == panel.admin.user["id"]]
    assert [(each["to"], each["reason"]) for each in by_admin] == [
        ("closed", "An admin reset it."),
        ("closed", "done"),
        ("open", "much longer"),
        ("open", "maintenance"),
    ]
    rows = (await panel.admin.get("/admin/audit?object_type=circuit_breaker")).json()["items"]
    assert [row["action"].rpartition(".")[2] for row in rows] == ["reset", "force_close", *["force_open"] * 3]


async def test_deletion_returns_a_guarded_breaker_to_its_defaults(panel: Panel) -> None:
    await panel.configure(status=200, minimum_calls=3)
    await panel.fails(3)
    await panel.sync()
    stale = await panel.admin.delete(f"/circuit-breakers/{NAME}", headers={"If-Match": '"1"'})
    assert stale.status == 412
    assert (await panel.admin.delete(f"/circuit-breakers/{NAME}")).status == 204
    found = await panel.get()
    assert (found["state"], found["minimum_calls"], found["source"]) == ("closed", 10, "default")
    assert await panel.call() == "fine"
    await panel.configure("mine")
    assert (await panel.admin.delete("/circuit-breakers/mine")).status == 204
    assert (await panel.admin.delete("/circuit-breakers/mine")).status == 404


@pytest.mark.one_engine
async def test_old_transitions_are_deleted(panel: Panel) -> None:
    await panel.act("force-open")
    clock.travel(31 * 86_400)
    panel.admin = await panel.kit.sign_in(panel.admin.user["email"])
    await panel.act("reset")
    await panel.kit.run_schedule("circuit_breakers.prune")
    assert await panel.kit.work(TransitionRow.select().count, read=True) == 1
