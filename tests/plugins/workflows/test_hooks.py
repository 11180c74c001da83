"""Step types that another plugin contributes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of, transform

from corral.auth.principal import Principal
from corral.ids import new_id
from corral.plugin import Plugin, hookimpl
from corral_core.accounts.api import Accounts
from corral_plugins.tasks.api import NewTask, Origin, Tasks
from corral_plugins.tools.api import ToolContext, ToolFailure
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepType, StepWait, Workflows
from corral_plugins.workflows.models import Run
from corral_plugins.workflows.service.tool import WorkflowTool

SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
calls: list[str] = []
waiting: list[str] = []


async def shout(context: StepContext) -> str:
    """Executed in the process: fails once for the word `again`."""
    calls.append(context.idempotency_key)
    if context.config["word"] == "again" and context.attempt == 1:
        raise StepFailure("busy", "The service is busy.")
    return str(context.config["word"]).upper()


def ask(context: StepContext) -> StepWait:
    """Waits for an object of this plugin, or breaks."""
    if context.config["word"] == "broken":
        raise RuntimeError("a fault in the plugin")
    waiting.append(new_id())
    return StepWait(waits_for=waiting[-1], status="waiting", person=True)


class ShoutPlugin(Plugin):
    """Shouts: contributes two step types."""

    name = "shouts"
    wants = ("workflows",)

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return [
            StepType(type="shouts.say", title="Shout", schema=SCHEMA, execute=shout),
            StepType(type="shouts.ask", title="Ask", schema=SCHEMA, dispatch=ask, waits=True),
            StepType(type="transform", title="Taken", schema=SCHEMA, execute=shout),
        ]


async def test_corral_workflow_steps(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, ShoutPlugin))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    types = await world.ok("GET", "/workflows/step-types")
    owners = {each["type"]: each["plugin"] for each in types["items"]}
    assert (owners["shouts.say"], owners["transform"]) == ("shouts", "workflows")
    answer = await world.member.post("/workflows", {"name": "x", "steps": [step("a", "shouts.say", {})]})
    assert answer.json()["errors"][0]["pointer"] == "/steps/0/config/word"
    workflow_id = await world.workflow(
        step("say", "shouts.say", {"word": "{{ input.word }}"}, retry_policy={"max_attempts": 2, "initial_seconds": 0}),
        step("ask", "shouts.ask", {"word": "{{ steps.say.output }}"}),
    )
    run_id = await world.start(workflow_id, {"word": "again"})
    run = await world.until(run_id, "waiting")
    said = steps_of(run)["say"]
    assert (said["output"], said["attempt"], said["attempts"][0]["error"]["type"]) == ("AGAIN", 2, "busy")
    assert [each for each in calls if each.startswith(run_id)] == [f"{run_id}:say:"] * 2
    workflows = kit.service(Workflows)
    assert await kit.work(lambda: workflows.end_step(waiting[-1], StepResult(output="yes")))
    run = await world.until(run_id)
    assert run["output"] == {"ask": "yes"}
    assert not await kit.work(lambda: workflows.end_step(waiting[-1], StepResult(output="no")))
    run = await world.run(step("broken", "shouts.ask", {"word": "broken"}))
    assert (run["status"], run["error"]["type"]) == ("failed", "internal")
    assert "fault" not in run["error"]["message"]


async def test_a_trigger_runs_a_workflow(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "triggers"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    workflow_id = await world.workflow(transform("out", "{{ get(input, 'n', 0) }}"))
    action = {"type": "run_workflow", "workflow_id": workflow_id, "input": {"n": 7}}
    made = await world.ok("POST", "/triggers", {"name": "now", "type": "manual", "config": {}, "action": action})
    await world.ok("POST", f"/triggers/{made['id']}/fire", {})
    await world.settle()
    (run,) = (await world.ok("GET", f"/workflow-runs?trigger_id={made['id']}"))["items"]
    assert (run["status"], run["trigger"]["type"]) == ("completed", "trigger")
    assert (await world.read(run["id"]))["output"] == {"out": 7}
    nothing = {**action, "workflow_id": new_id()}
    refused = await world.member.post("/triggers", {"name": "x", "type": "manual", "config": {}, "action": nothing})
    assert refused.code == "unknown_reference"


@pytest.mark.one_engine
async def test_a_trigger_is_refused_whose_fixed_input_the_workflow_does_not_accept(
    make_kit: Callable[..., Any],
) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "triggers"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    workflow_id = await world.workflow(transform("out", "{{ input.n }}"), config={"input_schema": schema})

    async def fault(**input: Any) -> str | None:
        action = {"type": "run_workflow", "workflow_id": workflow_id, **input}
        made = await world.member.post("/triggers", {"name": "x", "type": "manual", "action": action, "config": {}})
        return None if made.status == 201 else f"{made.status} {made.json()['errors'][0]['pointer']}"

    assert await fault(input={"n": "seven"}) == "422 /action/input/n"
    assert await fault(input={}) == await fault() == "422 /action/input/n"
    assert await fault(input={"n": 7}) is None
    assert await fault(input={"n": "{{ payload.n }}"}) is None


@pytest.mark.one_engine
async def test_an_agent_runs_a_workflow(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, "tools"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    workflow_id = await world.workflow(transform("out", "{{ input.n }}"))
    tool, trigger_id = kit.service(WorkflowTool), new_id()

    def create_task() -> str:
        by = kit.service(Accounts).principal_of(world.member.user["id"])
        origin = Origin(cause_chain=(trigger_id,))
        return str(kit.service(Tasks).create(NewTask(title="task"), by=by, origin=origin).id)

    task_id = await kit.work(create_task)

    def call(user_id: str) -> Any:
        caller = Principal(kind="agent", id=new_id(), agent_id=new_id(), user_id=user_id, role="member")
        context = ToolContext(
            caller=caller,
            task_id=task_id,
            lease_id=new_id(),
            call_id="1",
            config={},
            timeout_seconds=30,
            work=kit.kernel.database.work,
        )
        return tool.run(context, {"workflow_id": workflow_id, "input": {"n": 3}})

    started = await kit.work(lambda: call(world.member.user["id"]))
    run = await world.until(started["run_id"])
    assert (run["output"], run["started_by"]) == ({"out": 3}, world.member.user["id"])
    causes = await kit.work(lambda: Run.get_by_id(run["id"]).cause, read=True)
    assert causes == [trigger_id, task_id]  # the trigger of the task does not fire again because of the run
    viewer = await kit.as_user("viewer")
    with pytest.raises(ToolFailure, match="does not hold the permission"):
        await kit.work(lambda: call(viewer.user["id"]))


@pytest.mark.one_engine
async def test_an_executed_step_costs_few_statements(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=(*PLUGINS, ShoutPlugin))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    ran: list[str] = []
    database = kit.kernel.database
    for connection in (database.pools[0].threads[0].connection, database.connect(query_only=True)):
        connection.set_trace_callback(lambda text: ran.append(text) if '"workflows_' in text else None)

    async def count(steps: int) -> int:
        """Return the number of statements about a run and its steps."""
        say = [step(f"say{n}", "shouts.say", {"word": "x"}, order=n) for n in range(steps)]
        workflow_id = await world.workflow(*say)
        ran.clear()
        await world.start(workflow_id)
        async with asyncio.timeout(60):
            while sum(each.type == "workflow.run.completed" for each in await kit.events()) == ended:
                await kit.run_jobs()
                await asyncio.sleep(0.01)
        return len(ran)

    ended = 0
    first = await count(4)
    ended = 1
    cost = (await count(24) - first) / 20
    assert cost <= 6, cost


@pytest.mark.one_engine
async def test_a_trigger_warns_of_a_workflow_that_it_cannot_run(make_kit: Callable[..., Any]) -> None:
    """The failure would otherwise show after the first fire and its attempts, six minutes later."""
    kit = await make_kit(plugins=(*PLUGINS, "triggers"))
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    workflow_id = await world.workflow(transform("out", "x"), status="draft", name="Draft")
    action = {"type": "run_workflow", "workflow_id": workflow_id}
    made = await world.ok("POST", "/triggers", {"name": "now", "type": "manual", "config": {}, "action": action})
    (warning,) = made["warnings"]
    assert warning.startswith("The workflow Draft has the status draft, so the trigger fails.")
    assert warning.endswith(f"corral workflows edit {workflow_id} -f status=active")
    path, on = f"/triggers/{made['id']}", {"enabled": True}
    assert (await world.ok("POST", f"{path}/toggle", on))["warnings"] == [warning]
    await world.ok("PATCH", f"/workflows/{workflow_id}", {"status": "active"})
    assert (await world.ok("POST", f"{path}/toggle", on))["warnings"] == []
    await world.ok("PATCH", f"/workflows/{workflow_id}", {"status": "archived"})
    for caller in (world.member, world.admin):
        assert "archived" in (await world.ok("GET", path, by=caller))["warnings"][0]
    await world.ok("DELETE", f"/workflows/{workflow_id}")
    assert (await world.ok("POST", f"{path}/toggle", on))["warnings"] == ["There is no workflow with this id."]
    await world.ok("POST", f"{path}/toggle", {"enabled": False})
    assert (await world.member.post(f"{path}/toggle", on)).code == "unknown_reference"
