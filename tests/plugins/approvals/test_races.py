"""Requests while their task ends. Only PostgreSQL runs units of work at the same time."""

from __future__ import annotations

from tests.engines import POSTGRES
from tests.plugins.approvals.conftest import Desk
from tests.rival import Rival

pytestmark = POSTGRES


async def test_a_task_that_ends_at_the_same_time_gets_no_open_approval(desk: Desk, database_url: str) -> None:
    run, rival = await desk.run(), Rival(database_url)
    end = "UPDATE tasks_tasks SET status = 'cancelled' WHERE id = %s"
    request = run.agent.post("/approvals", {"title": "May I?", "task_id": run.task_id})
    answer = await rival.before(request, end, run.task_id)
    rival.close()
    assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, "/task_id"), answer
