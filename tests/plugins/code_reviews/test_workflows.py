"""The review policy of a workflow applies to the tasks of its steps, and the step ends by the decision."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tests.plugins.code_reviews.conftest import HUMAN, PLUGINS, Desk
from tests.plugins.workflows.conftest import World, step, steps_of

from corral.testing.kit import Kit


@pytest.mark.parametrize(("decision", "status"), [("approve", "completed"), ("reject", "failed")])
async def test_a_step_waits_for_the_review_of_its_task(
    make_kit: Callable[..., Awaitable[Kit]], decision: str, status: str
) -> None:
    desk = Desk()
    await desk.build(await make_kit(plugins=(*PLUGINS, "workflows", "expressions")))
    desk.other = await desk.kit.as_user("member")
    world = World(desk.kit, desk.member, desk.admin)
    change = step("change", "agent", {"instructions": "Change it."}, agent_id=desk.agent_id)
    run_id = await world.start(await world.workflow(change, config={"review_policy": HUMAN}))
    await world.settle()
    task = await desk.diff(await desk.worker.run())
    assert task["status"] == "waiting"
    await world.settle()
    assert (await world.read(run_id))["status"] not in ("completed", "failed")
    assert (await desk.act(task["review_id"], decision)).status == 200
    run = await world.until(run_id)
    assert (run["status"], steps_of(run)["change"]["status"]) == (status, status)


@pytest.mark.one_engine
async def test_without_the_plugin_a_workflow_cannot_ask_for_reviews(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=("admin", "agents", "workers", "tasks", "workflows", "expressions"))
    member = await kit.as_user("member")
    body = {"name": "w", "steps": [step("x", "transform", {"value": 1})], "config": {"review_policy": HUMAN}}
    answer = await member.post("/workflows", body)
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/config/review_policy/mode")
