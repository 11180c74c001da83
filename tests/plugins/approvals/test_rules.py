"""Rules that approve without a person, and the settings that make decisions stricter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.plugins.approvals.conftest import Desk

from corral.auth.principal import Principal
from corral.testing.kit import PASSWORD, Kit
from corral_plugins.workflows.api import RunRequest, Workflows


@pytest.fixture
async def desk(make_kit: Callable[..., Awaitable[Kit]]) -> Desk:
    """A desk that evaluates expressions."""
    return await Desk().set_up(make_kit, also=["expressions"])


async def set_rules(desk: Desk, *rules: dict[str, Any]) -> None:
    answer = await desk.admin.put("/settings/approvals/auto_approve", {"value": list(rules)})
    assert answer.status == 200, answer


async def status_of(desk: Desk, **asked: Any) -> tuple[str, list[str]]:
    """What becomes of a request; the status, and who decided."""
    made = await desk.ask(**asked)
    await desk.kit.run_jobs()
    view = await desk.read(made["id"])
    return view["status"], [each["user_id"] for each in view["decisions"]]


async def test_a_rule_approves_what_it_covers_and_nothing_else(desk: Desk) -> None:
    await set_rules(
        desk,
        {"id": "cheap", "max_risk": "medium", "when": "payload.amount < 10"},
        {"id": "broken", "max_risk": "medium", "when": "payload.nothing.at.all"},
    )
    small = await status_of(desk, payload={"amount": 5}, risk="medium")
    assert small == ("approved", ["rule:cheap"])
    assert (await status_of(desk, payload={"amount": 50}, risk="medium"))[0] == "pending"
    assert (await status_of(desk, payload={"amount": 5}, risk="high"))[0] == "pending"
    assert (await status_of(desk, payload={"amount": 5}, confidence=100, risk="critical"))[0] == "pending"
    assert (await status_of(desk, payload={"amount": 5}, required_approvals=2))[0] == "pending"


async def test_a_rule_for_a_tool_runs_the_call_but_never_that_of_a_tainted_run(desk: Desk) -> None:
    await set_rules(desk, {"id": "slow", "tool": "test.*", "max_risk": "medium", "max_cost_usd": 1})
    desk.bench.gate.set()
    run = await desk.run("test.*", tool_policy={"test.slow": "ask"})
    asked = (await run.say("test.slow", "untainted")).json()
    await desk.kit.run_jobs()
    assert (await desk.read(asked["approval_id"]))["status"] == "approved"
    assert (await run.say("test.page")).status == 200
    held = (await run.say("test.slow", "tainted")).json()
    await desk.kit.run_jobs()
    assert (await desk.read(held["approval_id"]))["status"] == "pending"
    assert {"text": "tainted"} not in desk.bench.runs


@pytest.mark.one_engine
async def test_a_rule_does_not_approve_a_request_that_hides_its_task(desk: Desk) -> None:
    """The agent of a tainted run could otherwise have its request approved without a person."""
    await set_rules(desk, {"id": "all", "max_risk": "medium"})
    run = await desk.run("test.*")
    assert (await run.say("test.page")).status == 200
    asked = await desk.ask(run.agent)
    await desk.kit.run_jobs()
    assert (await desk.read(asked["id"]))["status"] == "pending"
    other = (await desk.member.post("/tasks", {"title": "another task"})).json()
    refused = await run.agent.post("/approvals", {"title": "May I?", "task_id": other["id"]})
    assert (refused.status, refused.code) == (403, "forbidden")
    assert await status_of(desk) == ("approved", ["rule:all"])  # a person asked


@pytest.mark.one_engine
@pytest.mark.parametrize("is_tainted", [False, True])
async def test_a_rule_does_not_approve_a_step_of_a_tainted_run(
    make_kit: Callable[..., Awaitable[Kit]], is_tainted: bool
) -> None:
    desk = await Desk().set_up(make_kit, also=["expressions", "workflows"])
    await set_rules(desk, {"id": "all", "max_risk": "medium"})
    steps = [{"name": "ask", "step_type": "approval", "config": {"title": "Go on?"}}]
    workflow = (await desk.member.post("/workflows", {"name": "flow", "steps": steps})).json()
    request = RunRequest(workflow_id=workflow["id"], tainted=is_tainted)
    by = Principal(kind="user", id=desk.member.user["id"], user_id=desk.member.user["id"], role="admin")
    await desk.kit.work(lambda: desk.kit.service(Workflows).start(request, by=by))
    for _ in range(4):
        await desk.kit.run_jobs()
        await desk.kit.run_consumers()
    (approval,) = (await desk.admin.get("/approvals?status=all")).json()["items"]
    assert approval["status"] == ("pending" if is_tainted else "approved")


@pytest.mark.one_engine
async def test_only_admins_write_rules(desk: Desk) -> None:
    refused = await desk.member.put("/settings/approvals/auto_approve", {"value": []})
    assert refused.status == 403
    for wrong in ({"id": "x", "max_risk": "high"}, {"id": "x", "unknown": 1}, {"max_risk": "low"}):
        answer = await desk.admin.put("/settings/approvals/auto_approve", {"value": [wrong]})
        assert answer.status == 422, (wrong, answer)


@pytest.mark.one_engine
@pytest.mark.parametrize(
    ("condition", "told"),
    [("payload.price <", "(at character 16)"), ("price < 3", "'price' here; the known names are: agent")],
)
async def test_a_rule_whose_condition_is_invalid_is_refused(desk: Desk, condition: str, told: str) -> None:
    rules = [{"id": "all"}, {"id": "small", "when": condition}]
    refused = await desk.admin.put("/settings/approvals/auto_approve", {"value": rules})
    (fault,) = refused.json()["errors"]
    assert (refused.status, fault["pointer"]) == (422, "/value")
    assert "approvals.auto_approve has the rule small" in fault["detail"]
    assert told in fault["detail"]


@pytest.mark.one_engine
async def test_high_risk_can_demand_a_fresh_confirmation(desk: Desk) -> None:
    changed = await desk.admin.put("/settings/approvals/require_mfa_for_high", {"value": True})
    assert changed.status == 200
    asked = await desk.ask(risk="high")
    refused = await desk.admin.post(f"/approvals/{asked['id']}/approve")
    assert (refused.status, refused.code) == (403, "reauth_required")
    assert (await desk.other.post(f"/approvals/{asked['id']}/approve")).code == "forbidden"
    assert (await desk.admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await desk.admin.post(f"/approvals/{asked['id']}/approve")).status == 200
    low = await desk.ask(risk="low")
    assert (await desk.other.post(f"/approvals/{low['id']}/approve")).status == 200
