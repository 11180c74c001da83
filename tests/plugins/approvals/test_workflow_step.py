"""The workflow step `approval`: every outcome takes the path that the step configures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.workflows.conftest import PLUGINS, World, step, transform

from corral import clock

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def flow(make_kit: Callable[..., Any]) -> World:
    """A world with workflows and approvals."""
    kit = await make_kit(plugins=[*PLUGINS, "approvals"])
    assert kit.loaded("approvals").active, kit.loaded("approvals").reason
    return World(kit, await kit.as_user("member"), await kit.as_user("admin"))


async def waiting(flow: World, **config: Any) -> tuple[str, str]:
    """A run that waits for its step `ask`; the ids of the run and of the approval."""
    ask = step(
        "ask", "approval", {"title": "Deploy {{ input.what }}?", "payload": {"what": "{{ input.what }}"}, **config}
    )
    after = transform("after", "{{ steps.ask.output }}", depends_on=["ask"])
    other = transform("other", "other", depends_on=["after"])
    run_id = await flow.start(await flow.workflow(ask, after, other), {"what": "it"})
    await flow.until(run_id, "waiting")
    (approval,) = (await flow.ok("GET", f"/approvals?run_id={run_id}"))["items"]
    assert (approval["type"], approval["step"], approval["title"]) == ("workflow_step", "ask", "Deploy it?")
    return run_id, approval["id"]


def statuses(run: dict[str, Any]) -> dict[str, str]:
    """The status of each step."""
    return {each["name"]: each["status"] for each in run["steps"]}


async def test_an_approval_lets_the_run_go_on_with_the_decision(flow: World) -> None:
    run_id, approval = await waiting(flow)
    await flow.ok("POST", f"/approvals/{approval}/approve", {"note": "go"})
    run = await flow.until(run_id)
    assert run["status"] == "completed", run
    output = next(each for each in run["steps"] if each["name"] == "ask")["output"]
    told = {"decision": "approved", "by": flow.member.user["id"], "note": "go", "payload": {"what": "it"}}
    assert output == told


@pytest.mark.parametrize(
    ("path", "ended", "asked"),
    [("fail", "failed", "failed"), ("skip", "completed", "skipped"), ("goto:other", "completed", "completed")],
)
async def test_a_rejection_takes_the_configured_path(flow: World, path: str, ended: str, asked: str) -> None:
    run_id, approval = await waiting(flow, on_reject=path)
    await flow.ok("POST", f"/approvals/{approval}/reject", {"note": "not today"})
    run = await flow.until(run_id)
    assert (run["status"], statuses(run)["ask"]) == (ended, asked), run
    if path == "fail":
        assert run["error"]["type"] == "rejected"
        assert "not today" in run["error"]["message"]
    if path == "goto:other":
        assert statuses(run)["other"] == "completed"


@pytest.mark.parametrize(
    ("config", "ended"),
    [({}, "failed"), ({"on_timeout": "skip"}, "completed"), ({"on_timeout": "approve"}, "completed")],
)
async def test_silence_takes_the_configured_path(flow: World, config: dict[str, Any], ended: str) -> None:
    run_id, _ = await waiting(flow, expires_in_seconds=900, **config)
    clock.travel(901)
    await flow.kit.run_schedule("approvals.sweep")
    flow.member = await flow.kit.sign_in(flow.member.user["email"])
    assert (await flow.until(run_id))["status"] == ended


async def test_a_cancelled_run_withdraws_its_request(flow: World) -> None:
    run_id, approval = await waiting(flow)
    await flow.ok("POST", f"/workflow-runs/{run_id}/cancel", {})
    await flow.until(run_id)
    assert (await flow.ok("GET", f"/approvals/{approval}"))["status"] == "cancelled"
    own = await flow.start(await flow.workflow(step("ask", "approval", {"title": "x"})))
    await flow.until(own, "waiting")
    (asked,) = (await flow.ok("GET", f"/approvals?run_id={own}"))["items"]
    await flow.ok("POST", f"/approvals/{asked['id']}/cancel", {"reason": "not needed"})
    assert (await flow.until(own))["error"]["type"] == "cancelled"


async def test_what_cannot_be_is_refused_when_the_workflow_is_saved(flow: World) -> None:
    for config in (
        {"title": "x", "risk": "high", "on_timeout": "approve"},
        {"title": "x", "escalate_to": {"roles": ["admin"]}},
        {"title": "x", "on_reject": "goto:nowhere"},
        {"title": "x", "on_reject": "perhaps"},
        {},
    ):
        body = {"name": "w", "steps": [step("ask", "approval", config)]}
        answer = await flow.member.post("/workflows", body)
        assert answer.status == 422, (config, answer)


async def test_a_request_may_name_a_run_whose_end_cancels_it(flow: World) -> None:
    run_id, _ = await waiting(flow)
    body = {"title": "Send the mail of {{ input }}?", "run_id": run_id.upper(), "step": "after"}
    asked = await flow.ok("POST", "/approvals", body)
    assert (asked["run_id"], asked["step"], asked["status"]) == (run_id, "after", "pending")
    await flow.ok("POST", f"/workflow-runs/{run_id}/cancel", {})
    await flow.until(run_id)
    await flow.settle()
    found = await flow.ok("GET", f"/approvals/{asked['id']}")
    assert (found["status"], found["outcome_note"]) == ("cancelled", "The workflow run has ended.")
    refused = await flow.member.post("/approvals", body)
    assert (refused.status, refused.json()["errors"][0]["pointer"]) == (422, "/run_id")
