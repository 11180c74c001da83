"""What a task costs the database from its creation to its completion: units of work, statements, events, plans."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import peewee
import pytest
from tests.plugins.tasks.conftest import World

from corral.database.unit import SYSTEM_CONTEXT, Unit, current, in_unit
from corral.events.log import write_events

pytestmark = pytest.mark.one_engine

CREATE, CLAIM = "POST /tasks", "POST /workers/{id}/claim"
START, COMPLETE = "POST /tasks/{id}/start", "POST /tasks/{id}/complete"
SHARED = SYSTEM_CONTEXT.label  # the writes that the units of a transaction share
STATEMENTS = {CREATE: 1, CLAIM: 14, START: 4, COMPLETE: 12, SHARED: 19}
EVENTS = {CREATE: 1, CLAIM: 2, START: 1, COMPLETE: 2}  # the agent becomes busy, and idle again
READ_NOW_AND_THEN = ('"workers_workers"', '"accounts_', 'SELECT "t1"."n" FROM "tasks_counters"')
"""What a request reads at most once a second, and the row of the worker, whose last contact is written now and then."""
PLANNED_ONCE = ("tasks_", "agents_", "kernel_", "messages_", "approvals_", "files_")
NEW_TASK = {
    "title": "Summarise the report",
    "instructions": "Be brief.",
    "input": {"pages": [1, 2]},
    "tags": ["report", "finance"],
    "metadata": {"customer": "c-1042"},
    "timeout_seconds": 600,
}


@dataclasses.dataclass
class Costs:
    """What ran in the units of work of each route."""

    statements: defaultdict[str, list[str]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    units: Counter[str] = dataclasses.field(default_factory=Counter)
    events: Counter[str] = dataclasses.field(default_factory=Counter)
    plans: Counter[str] = dataclasses.field(default_factory=Counter)
    built: Counter[str] = dataclasses.field(default_factory=Counter)

    def clear(self) -> None:
        """Forget what ran so far."""
        for counted in (self.statements, self.units, self.events, self.plans, self.built):
            counted.clear()


@pytest.fixture
async def world(make_kit: Callable[..., Any]) -> World:
    """A world with all plugins, because each of them may add to the cost of a task."""
    return await World().build(await make_kit())


@pytest.fixture
def costs(world: World, monkeypatch: pytest.MonkeyPatch) -> Costs:
    """What the writer does from now on."""
    database, found = world.kit.kernel.database, Costs()
    (writer,) = database.pools[0].threads
    submit, finish, query = database._submit, Unit.finish, peewee.Context.query

    def counts(text: str) -> bool:
        return in_unit() and not any(part in text for part in READ_NOW_AND_THEN)

    def trace(text: str) -> None:
        if counts(text):
            found.statements[current().entry.label].append(text)

    def built(context: Any) -> Any:
        sql, values = query(context)
        if counts(sql):
            found.built[f"{current().entry.label}: {sql}"] += 1
        return sql, values

    def authorize(action: int, table: str | None, *_: object) -> int:  # called while SQLite plans a statement
        if in_unit() and table is not None and table.startswith(PLANNED_ONCE):
            found.plans[f"{current().entry.label}: {table}"] += 1
        return 0

    def submitted(queued: Any) -> None:
        found.units[queued.entry.label] += 1
        submit(queued)

    def finished(unit: Unit) -> None:
        finish(unit)
        found.events[unit.entry.label] += sum(write is write_events for write, _ in unit.collected)

    writer.connection.set_trace_callback(trace)
    writer.connection.set_authorizer(authorize)
    monkeypatch.setattr(database, "_submit", submitted)
    monkeypatch.setattr(Unit, "finish", finished)
    monkeypatch.setattr(peewee.Context, "query", built)
    return found


async def cycle(world: World) -> None:
    """Create a task, and let the worker claim, start and complete it."""
    assert (await world.member.post("/tasks", NEW_TASK)).status == 201
    lease = await world.worker.claim(max_tasks=1, wait_seconds=0)
    await lease.ok("start")
    await lease.ok("complete", {"result": {"text": "done"}})


async def test_a_task_costs_four_units_and_few_statements(world: World, costs: Costs) -> None:
    for _ in range(3):  # fills the caches
        await cycle(world)
    costs.clear()
    await cycle(world)
    routes = (CREATE, CLAIM, START, COMPLETE)
    assert {route: costs.units[route] for route in routes} == dict.fromkeys(routes, 1)
    assert {route: costs.events[route] for route in routes} == EVENTS
    for route, most in STATEMENTS.items():
        assert len(costs.statements[route]) <= most, costs.statements[route]
    # The condition of a partial index can make SQLite plan a statement each time, and building a query takes ten times
    # as long as running it. Sweeps of the background, which run now and then, do both.
    of_routes = tuple(f"{route}: " for route in routes)
    assert not [each for each in (*costs.plans, *costs.built) if each.startswith(of_routes)]


async def test_nothing_is_read_for_each_event_where_nobody_waits_for_tasks(world: World, costs: Costs) -> None:
    for _ in range(3):
        await cycle(world)
    await world.kit.run_consumers()
    for _ in range(5):
        await cycle(world)
    costs.clear()
    await world.kit.run_consumers()
    consumers = {label: n for label, n in costs.units.items() if label.startswith("consumer ")}
    handled = {label: texts for label, texts in costs.statements.items() if label.startswith("consumer ")}
    assert consumers == {"consumer cost.outcomes": 1, "consumer workflows.steps": 1}  # a unit for all events
    # The lease, the position, the events and the new position; and a statement for each event.
    assert {label: len(texts) for label, texts in handled.items()} == dict.fromkeys(consumers, 4 + 5)
    assert not [each for each in costs.built if each.startswith(tuple(consumers))]
