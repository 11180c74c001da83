"""A workflow run goes on after the retry of the dead task that failed it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.plugins.dead_letter.conftest import Morgue
from tests.plugins.workflows.conftest import World, step

from corral.testing.kit import Kit


async def test_dead_letter_7_a_failed_run_completes_after_the_retry(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    plugins = ("admin", "agents", "workers", "tasks", "workflows", "expressions", "dead_letter")
    morgue = Morgue()
    await morgue.build(await make_kit(plugins=plugins))
    world = World(morgue.kit, morgue.member, morgue.admin)
    work = step("work", "agent", {"instructions": "Do it."}, agent_id=morgue.agent_id)
    run_id = await world.start(await world.workflow(work))
    await world.until(run_id, "running")
    lease = await morgue.worker.run()
    await lease.ok("fail", {"error": {"type": "Boom", "message": "x"}, "retryable": False})
    await world.until(run_id, "failed")
    letter = await morgue.letter(lease.task_id)
    assert letter["workflow_run_id"] == run_id
    assert (await morgue.admin.post(f"/dead-letter/{letter['id']}/retry", {})).status == 200
    await world.until(run_id, "running")
    await (await morgue.worker.run()).ok("complete", {"result": {"text": "done"}})
    assert (await world.until(run_id))["status"] == "completed"
