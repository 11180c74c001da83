"""Failures, cancellation, pauses, time limits, and limits on active runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.workflows.conftest import World, statuses, step, steps_of, transform

from corral import clock
from corral.events.consumers import POISON_TRIES
from corral.events.log import LoggedEvent
from corral_plugins.workflows import jobs as workflow_jobs
from corral_plugins.workflows.models import Run, StepRun, WorkflowVersion
from corral_plugins.workflows.service import composite_steps, definitions, event_waits

BAD = "{{ input.absent }}"


@pytest.fixture(autouse=True)
def _clock() -> Any:
    yield
    clock.reset()


def ask(name: str, **fields: Any) -> dict[str, Any]:
    """A step that waits for a person."""
    return step(name, "input", {"prompt": "?"}, **fields)


async def answer(world: World, run_id: str, name: str, given: Any = 1) -> None:
    """Answer a step that waits for a person."""
    await world.ok("POST", f"/workflow-runs/{run_id}/steps/{name}/input", {"input": given})


@pytest.mark.one_engine
async def test_a_failed_step_stops_the_run_and_runs_the_failure_step(world: World) -> None:
    run = await world.run(
        transform("bad", BAD),
        transform("after", 1),
        transform("tell", "{{ steps.bad.error.type }}"),
        config={"on_failure_step": "tell"},
    )
    assert (run["status"], run["error"]["step"], run["error"]["type"]) == ("failed", "bad", "template_error")
    assert statuses(run, "bad", "tell") == ["failed", "completed"]
    assert steps_of(run)["tell"]["output"] == "template_error"
    assert "after" not in {each["name"] for each in run["steps"]}


@pytest.mark.one_engine
async def test_on_error_continue_and_run_if(world: World) -> None:
    run = await world.run(
        transform("bad", BAD, on_error="continue"),
        transform("good", 1, order=1),
        transform("success", 1, depends_on=["bad", "good"]),
        transform("any", 1, depends_on=["bad", "good"], run_if="any_success"),
        transform("failed", 1, depends_on=["bad", "good"], run_if="any_failed"),
        transform("done", 1, depends_on=["success"], run_if="all_done"),
        transform("all", 1, depends_on=["success", "any"], run_if="all_success"),
    )
    assert run["status"] == "completed", run
    names = ("bad", "success", "any", "failed", "done", "all")
    assert statuses(run, *names) == ["failed", "skipped", "completed", "completed", "completed", "skipped"]
    assert steps_of(run)["success"]["reason"] == "upstream_failed"


@pytest.mark.one_engine
async def test_on_error_goto_jumps_forward(world: World) -> None:
    steps = (transform("bad", BAD, on_error="goto:last"), transform("middle", 1), transform("last", 2))
    run = await world.run(*steps)
    assert run["status"] == "completed", run
    assert statuses(run, "bad", "middle", "last") == ["failed", "skipped", "completed"]
    back = [transform("first", 1), transform("bad", 1, on_error="goto:first")]
    refused = await world.member.post("/workflows", {"name": "x", "steps": back})
    assert refused.code == "cycle"


async def test_on_error_pause_waits_for_a_decision(world: World) -> None:
    workflow_id = await world.workflow(
        transform("bad", BAD, on_error="pause"), transform("after", "{{ get(steps.bad, 'output', 0) }}")
    )
    for action, output, expected in (("skip", 5, "completed"), ("abort", None, "failed"), ("retry", None, "waiting")):
        run_id = await world.start(workflow_id)
        run = await world.until(run_id, "waiting")
        assert steps_of(run)["bad"]["reason"] == "error"
        body = {"action": action, "output": output}
        await world.ok("POST", f"/workflow-runs/{run_id}/steps/bad/resolve", body)
        await world.settle()
        run = await world.read(run_id)
        assert run["status"] == expected, run
        if action == "skip":
            assert run["output"] == {"after": 5}
        if action == "retry":
            assert steps_of(run)["bad"]["attempts"][1]["error"]["type"] == "template_error"


async def test_cancel_ends_all_steps_and_starts_nothing(world: World) -> None:
    run_id = await world.start(await world.workflow(ask("one"), ask("two", order=1), transform("after", 1)))
    await world.until(run_id, "waiting")
    stranger = await world.kit.as_user("member")
    assert (await stranger.post(f"/workflow-runs/{run_id}/cancel", {})).status == 403
    cancelled = await world.member.post(f"/workflow-runs/{run_id}/cancel", {"reason": "enough"})
    assert cancelled.status == 202
    run = await world.until(run_id)
    assert run["status"] == "cancelled"
    assert statuses(run, "one", "two") == ["cancelled", "cancelled"]
    assert (await world.member.post(f"/workflow-runs/{run_id}/cancel", {})).code == "invalid_state"
    told = [event for event in await world.kit.events() if event.type == "workflow.run.cancelled"]
    assert told[0].payload()["reason"] == "enough"


async def test_a_paused_run_starts_nothing(world: World) -> None:
    run_id = await world.start(await world.workflow(ask("one"), transform("after", 1)))
    await world.until(run_id, "waiting")
    await world.ok("POST", f"/workflow-runs/{run_id}/pause")
    await answer(world, run_id, "one")
    await world.settle()
    run = await world.read(run_id)
    assert (run["status"], statuses(run, "one", "after")) == ("paused", ["completed", "pending"])
    await world.ok("POST", f"/workflow-runs/{run_id}/resume")
    assert (await world.until(run_id))["status"] == "completed"


async def test_the_time_limit_does_not_count_time_for_people(world: World) -> None:
    config = {"timeout_seconds": 60}
    run_id = await world.start(await world.workflow(ask("one"), step("two", "wait", {"seconds": 50}), config=config))
    await world.until(run_id, "waiting")
    clock.travel(600)
    await world.kit.run_schedule("workflows.sweep")
    await answer(world, run_id, "one")
    await world.settle()
    assert (await world.read(run_id))["status"] == "waiting"
    clock.travel(55)
    await world.kit.run_schedule("workflows.sweep")
    assert (await world.until(run_id))["status"] == "completed"
    run_id = await world.start(await world.workflow(step("two", "wait", {"seconds": 500}), config=config))
    await world.until(run_id, "waiting")
    clock.travel(61)
    await world.kit.run_schedule("workflows.sweep")
    run = await world.until(run_id)
    assert (run["status"], run["error"]["kind"]) == ("failed", "timeout")


@pytest.mark.one_engine
async def test_an_unanswered_question_expires(world: World) -> None:
    question = step("one", "input", {"prompt": "?", "expires_in_seconds": 30}, on_error="continue")
    run_id = await world.start(await world.workflow(question, transform("after", 1, run_if="any_failed")))
    await world.until(run_id, "waiting")
    clock.travel(31)
    await world.kit.run_schedule("workflows.sweep")
    run = await world.until(run_id)
    assert (run["status"], steps_of(run)["one"]["error"]["type"]) == ("completed", "expired")


@pytest.mark.parametrize("on_limit", ["queue", "skip", "cancel_running"])
async def test_the_limit_on_active_runs(world: World, on_limit: str) -> None:
    config = {"concurrency": {"limit": 1, "on_limit": on_limit}}
    workflow_id = await world.workflow(ask("one"), config=config)
    first = await world.start(workflow_id)
    await world.until(first, "waiting")
    second = await world.member.post(f"/workflows/{workflow_id}/run", {})
    if on_limit == "skip":
        assert (second.status, second.code) == (429, "concurrency_limit")
        return
    run_id = second.json()["id"]
    await world.settle()
    if on_limit == "queue":
        third = await world.start(workflow_id)
        await world.settle()
        assert (await world.read(run_id))["status"] == "queued"
        await answer(world, first, "one")
        await world.until(run_id, "waiting")
        assert (await world.read(third))["status"] == "queued"
    else:
        assert (await world.until(first))["status"] == "cancelled"
        await world.until(run_id, "waiting")


@pytest.mark.one_engine
async def test_the_first_branch_ends_the_others(world: World) -> None:
    branches = [
        {"name": "fast", "steps": [transform("now", 1)]},
        {"name": "slow", "steps": [ask("later"), transform("never", 1)]},
    ]
    run = await world.run(step("race", "parallel", {"branches": branches, "join": "any"}))
    assert run["status"] == "completed", run
    assert run["output"] == {"race": {"fast": 1, "slow": None}}
    assert statuses(run, "later") == ["cancelled"]


async def test_a_while_loop_and_nested_loops(world: World) -> None:
    run = await world.run(
        step(
            "poll",
            "loop",
            {
                "while": "index < 3 || steps.probe.output < 5",
                "body": [transform("probe", "{{ index + 1 }}")],
            },
        ),
        step(
            "outer",
            "loop",
            {
                "items": [[1, 2], [3]],
                "body": [step("inner", "loop", {"items": "{{ item }}", "body": [transform("x", "{{ item * 10 }}")]})],
            },
        ),
    )
    assert run["status"] == "completed", run["error"]
    found = steps_of(run)
    assert found["poll"]["output"]["results"] == [1, 2, 3, 4, 5]
    assert [each["results"] for each in found["outer"]["output"]["results"]] == [[10, 20], [30]]
    assert found["x[0][1]"]["output"] == 20


@pytest.mark.one_engine
async def test_a_workflow_runs_another_one(world: World) -> None:
    child = await world.workflow(transform("double", "{{ input.n * 2 }}"))
    call = step("call", "workflow", {"workflow_id": child, "input": {"n": "{{ input.n }}"}})
    run = await world.run(call, transform("sum", "{{ steps.call.output.double + 1 }}"), input={"n": 4})
    assert run["output"] == {"sum": 9}, run
    found = steps_of(run)["call"]
    inner = await world.read(found["child_run_id"])
    assert (inner["parent_run_id"], inner["depth"]) == (run["id"], 1)


async def test_a_step_waits_for_an_event(world: World) -> None:
    wait = {"event": {"event": "agent.created", "filter": "event.data.name == 'second'"}}
    run_id = await world.start(await world.workflow(step("await", "wait", wait)))
    await world.until(run_id, "waiting")
    for name in ("first", "second"):
        await world.ok("POST", "/agents", {"name": name})
    await world.kit.events()
    await world.kit.run_schedule("workflows.sweep")
    run = await world.until(run_id)
    assert run["output"]["await"]["event"]["data"]["name"] == "second"


async def test_a_step_waits_only_for_events_that_the_starter_may_read(world: World) -> None:
    workflow_id = await world.workflow(step("await", "wait", {"event": {"event": "invitation.created"}}))
    by_member = await world.start(workflow_id)
    by_admin: str = (await world.ok("POST", f"/workflows/{workflow_id}/run", {"input": {}}, by=world.admin))["id"]
    for run_id in (by_member, by_admin):
        await world.until(run_id, "waiting")
    await world.ok("POST", "/admin/invitations", {"email": "new@example.org"}, by=world.admin)
    await world.kit.events()
    await world.kit.run_schedule("workflows.sweep")
    run = await world.until(by_admin)
    assert run["output"]["await"]["event"]["event"] == "invitation.created"
    await world.settle()
    assert (await world.read(by_member))["status"] == "waiting"


async def test_an_event_that_cannot_be_handled_for_a_step_is_skipped_after_five_tries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = event_waits._complete_step

    def break_on_poison(row: Any, event: LoggedEvent, *rest: Any) -> None:
        if event.payload()["name"] == "poison" and row.run_id == broken:
            raise RuntimeError("poison")
        complete(row, event, *rest)

    monkeypatch.setattr(event_waits, "_complete_step", break_on_poison)
    workflow_id = await world.workflow(step("await", "wait", {"event": {"event": "agent.created"}}))
    broken, *others = [await world.start(workflow_id) for _ in range(3)]
    for run_id in (broken, *others):
        await world.until(run_id, "waiting")
    await world.ok("POST", "/agents", {"name": "poison"})
    await world.kit.events()
    await world.kit.run_schedule("workflows.sweep")
    for run_id in others:
        assert (await world.until(run_id))["output"]["await"]["event"]["data"]["name"] == "poison"
    for _ in range(POISON_TRIES):
        await world.kit.run_schedule("workflows.sweep")
    assert (await world.read(broken))["status"] == "waiting"
    await world.ok("POST", "/agents", {"name": "next"})
    alerts = [each.payload() for each in await world.kit.events() if each.type == "system.alert"]
    assert [(alert["kind"], alert["object"]["id"]) for alert in alerts] == [("consumer_behind", broken)]
    await world.kit.run_schedule("workflows.sweep")
    assert (await world.until(broken))["output"]["await"]["event"]["data"]["name"] == "next"


@pytest.mark.one_engine
async def test_events_of_a_run_are_listed_and_streamed(world: World) -> None:
    run = await world.run(transform("one", 1))
    await world.kit.events()
    path = f"/workflow-runs/{run['id']}/events"
    page = await world.ok("GET", path)
    names = [event["event"] for event in page["items"]]
    expected = ["workflow.run.created", "workflow.run.started", "step.started", "step.completed"]
    assert names == [*expected, "workflow.run.completed"]
    rest = await world.ok("GET", f"{path}?after={page['items'][2]['seq']}")
    assert [event["event"] for event in rest["items"]] == names[3:]
    headers = {"accept": "text/event-stream", "last-event-id": str(page["items"][1]["seq"])}
    streamed = await world.member.get(path, headers=headers)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    told = [line.removeprefix(b"event: ").decode() for line in streamed.body.split(b"\n") if line.startswith(b"event:")]
    assert told == names[2:]


async def test_an_agent_step_creates_a_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = await world.ok("POST", "/agents", {"name": "worker"})
    workflow_id = await world.workflow(
        step("work", "agent", {"instructions": "say {{ input.n }}"}, agent_id=agent["id"])
    )
    run_id = await world.start(workflow_id, {"n": 3})
    await world.settle()
    run = await world.read(run_id)
    task_id = steps_of(run)["work"]["task_id"]
    task = await world.ok("GET", f"/tasks/{task_id}")
    assert (task["instructions"], task["workflow_run_id"], run["status"]) == ("say 3", run_id, "running")
    await world.ok("POST", f"/workflow-runs/{run_id}/cancel", {})
    await world.settle()
    run = await world.until(run_id)
    assert run["status"] == "cancelled"
    assert (await world.ok("GET", f"/tasks/{task_id}"))["status"] == "cancelled"


async def test_a_failed_run_goes_on_when_its_task_is_retried(world: World) -> None:
    ask = step("ask", "agent", {"instructions": "go"})
    workflow_id = await world.workflow(ask, transform("after", "{{ steps.ask.output.text }}"))
    run_id = await world.start(workflow_id)
    await world.settle()
    task_id = steps_of(await world.read(run_id))["ask"]["task_id"]
    await world.ok("POST", f"/tasks/{task_id}/fail", {"error": {"type": "broken", "message": "no"}})
    run = await world.until(run_id)
    assert (run["status"], run["error"]["type"]) == ("failed", "broken")
    await world.ok("POST", f"/tasks/{task_id}/retry", {})
    await world.settle()
    run = await world.read(run_id)
    assert (run["status"], run["error"], run["finished_at"]) == ("running", None, None)
    assert statuses(run, "ask", "after") == ["running", "pending"]
    await world.ok("POST", f"/tasks/{task_id}/complete", {"result": {"text": "done"}})
    run = await world.until(run_id)
    assert (run["status"], run["output"]) == ("completed", {"after": "done"})
    names = [each["event"] for each in (await world.ok("GET", f"/workflow-runs/{run_id}/events?limit=200"))["items"]]
    kept = [name for name in names if name.startswith("workflow.run.")]
    ends = ["workflow.run.failed", "workflow.run.resumed", "workflow.run.completed"]
    assert kept == ["workflow.run.created", "workflow.run.started", *ends]


async def test_deleting_a_workflow_cancels_all_of_its_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (definitions, workflow_jobs):
        monkeypatch.setattr(module, "CANCEL_BATCH", 2)
    workflow_id = await world.workflow(step("pause", "wait", {"seconds": 3600}))
    ids = [await world.start(workflow_id) for _ in range(5)]
    await world.settle()
    refused = await world.member.request("DELETE", f"/workflows/{workflow_id}")
    assert (refused.code, refused.json()["references"]) == ("in_use", ids)
    await world.ok("DELETE", f"/workflows/{workflow_id}?force=true")
    await world.settle()
    assert [(await world.read(run_id))["status"] for run_id in ids] == ["cancelled"] * 5


async def test_an_archived_workflow_is_not_retried(world: World) -> None:
    workflow_id = await world.workflow(transform("a", 1))
    run = await world.until(await world.start(workflow_id))
    await world.ok("PATCH", f"/workflows/{workflow_id}", {"status": "archived"})
    answer = await world.member.post(f"/workflow-runs/{run['id']}/retry", {"from": "start"})
    assert (answer.status, answer.code) == (409, "invalid_state")


async def test_abandoned_steps_are_taken_over(world: World) -> None:
    http = {"method": "GET", "url": "http://127.0.0.1/"}
    run_id = await world.start(await world.workflow(step("call", "http", http)))

    def abandon() -> None:
        """As if another process had started the step and died."""
        changes = {"lease": "01890a5d-ac96-774b-bcce-b302099a8057", "lease_until": clock.now(60)}
        StepRun.update({**changes, "report": None, "status": "running"}).where(StepRun.run_id == run_id).execute()

    engine = world.kit.service(_engine())
    found: Callable[..., Any] = engine._starter.start
    engine._starter.start = lambda *_: None
    await world.settle()
    engine._starter.start = found
    await world.kit.work(abandon)
    await world.kit.run_schedule("workflows.sweep")
    await world.settle()
    assert (await world.read(run_id))["status"] == "running"
    clock.travel(61)
    await world.kit.run_schedule("workflows.sweep")
    run = await world.until(run_id)
    assert (run["status"], run["error"]["type"]) == ("failed", "egress.address")


def _engine() -> Any:
    from corral_plugins.workflows.service.engine import Engine

    return Engine


async def test_a_run_that_cannot_be_advanced_fails_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    workflow_id = await world.workflow(transform("one", 1))
    with monkeypatch.context() as patch:
        patch.setattr("corral_plugins.workflows.service.planner.Planner._apply_reports", broken)
        run = await world.until(await world.start(workflow_id))
    assert (run["status"], run["error"]["type"]) == ("failed", "internal")
    assert (await world.until(await world.start(workflow_id)))["status"] == "completed"
    assert world.kit.loaded("workflows").active


async def test_runs_that_ended_long_ago_are_deleted_with_the_versions_of_deleted_workflows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow_jobs, "STEP_BATCH", 2)  # a run may have more steps than a unit of work may delete
    old, waiting = (
        await world.workflow(*(transform(name, 1) for name in ("one", "two", "three", "four", "out"))),
        await world.workflow(step("ask", "input", {"prompt": "?"})),
    )
    ended = await world.until(await world.start(old))
    assert (await world.until(await world.start(waiting), "waiting"))["status"] == "waiting"
    await world.ok("DELETE", f"/workflows/{old}")
    await world.kit.run_schedule("workflows.prune")
    assert (await world.read(ended["id"]))["status"] == "completed"
    clock.travel(181 * 86_400)
    await world.kit.run_schedule("workflows.prune")
    assert await world.kit.work(lambda: [row.workflow_id for row in Run.select()]) == [waiting]
    assert await world.kit.work(lambda: [row.name for row in StepRun.select()]) == ["ask"]
    assert await world.kit.work(lambda: [row.workflow_id for row in WorkflowVersion.select()]) == [waiting]


@pytest.mark.one_engine
@pytest.mark.parametrize("on_item_error", ["fail", "collect"])
async def test_nested_loops_end_at_the_maximum_number_of_steps_of_a_run(
    world: World, monkeypatch: pytest.MonkeyPatch, on_item_error: str
) -> None:
    monkeypatch.setattr(composite_steps, "MAX_STEP_RUNS", 30)
    items: dict[str, Any] = {"items": list(range(10)), "concurrency": 3, "on_item_error": on_item_error}
    inner = step("inner", "loop", {**items, "body": [transform("leaf", "{{ index }}")]})
    run = await world.run(step("outer", "loop", {**items, "body": [inner]}))
    assert run["status"] == "failed"
    assert run["error"]["type"] == "max_steps"
    assert "30 steps" in run["error"]["message"]
    assert len(run["steps"]) <= 30 + items["concurrency"]  # those that had begun
