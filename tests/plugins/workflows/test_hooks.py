"""Step types that another plugin contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of

from corral.ids import new_id
from corral.plugin import Plugin, hookimpl
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepType, StepWait, Workflows

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
    """Waits for an object of this plugin."""
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
    assert calls == [f"{run_id}:say:"] * 2
    workflows = kit.service(Workflows)
    assert await kit.work(lambda: workflows.end_step(waiting[-1], StepResult(output="yes")))
    run = await world.until(run_id)
    assert run["output"] == {"ask": "yes"}
    assert not await kit.work(lambda: workflows.end_step(waiting[-1], StepResult(output="no")))
