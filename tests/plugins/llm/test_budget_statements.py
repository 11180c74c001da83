"""What a budget adds to a claim and to a call, in statements: one for each scope, and one for the reservation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.plugins.llm.test_budgets import ask, attempt, budget, world
from tests.plugins.tasks.conftest import World

__all__ = ["world"]

pytestmark = pytest.mark.one_engine


@pytest.fixture
def statements(world: World) -> Callable[[], Any]:
    """A context in which the statements about budgets and reservations are collected."""
    database = world.kit.kernel.database
    connections = [thread.connection for pool in database.pools for thread in pool.threads if thread.connection]
    tables = (
        '"cost_budget',
        '"cost_reservations"',
        '"cost_agent_limits"',
        'tasks_attempts" AS "t1" WHERE (("t1"."agent_id"',
    )

    @contextmanager
    def collecting() -> Iterator[list[str]]:
        ran: list[str] = []
        for connection in connections:
            connection.set_trace_callback(lambda text: ran.append(text) if any(t in text for t in tables) else None)
        yield ran
        for connection in connections:
            connection.set_trace_callback(None)

    return collecting


@pytest.mark.parametrize("scopes", [1, 2])
async def test_a_budget_adds_a_statement_for_each_scope_and_one(
    world: World, statements: Callable[[], Any], upstream: Any, scopes: int
) -> None:
    await budget(world, monthly_limit=10)
    if scopes == 2:
        changed = await world.member.put(f"/agents/{world.agent_id}/budget", {"monthly_budget_usd": 5})
        assert changed.status == 200, changed
    for _ in range(3):
        await world.task()
    await world.worker.run()  # fills the caches
    with statements() as ran:
        lease = await world.worker.run()
    assert len(ran) == scopes + 1, ran
    assert (await ask(attempt(lease))).status == 200
    with statements() as ran:
        answer = await ask(attempt(lease))
    assert answer.status == 200
    assert answer.headers["corral-budget-remaining-usd"]
    assert len(ran) == 1 + 1 + scopes + 1, ran  # the draw; the event, the reservation and the counters
    with statements() as ran:
        await lease.ok("complete", {"result": {}})
    assert len(ran) == 1 + scopes, ran
