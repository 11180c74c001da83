"""Criterion 11 of tasks: what the size of the table does to lists, statistics and claims.

The filters and orders come from the query of the list itself, so that a new one is tried without being named here.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
from urllib.parse import urlencode

import msgspec
import pytest
from tests.benchmarks import seeds
from tests.plugins.tasks.conftest import World

from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.database.unit import current
from corral.http.page import PageQuery
from corral.ids import new_id
from corral.testing.kit import Client, Kit, make_kernel
from corral_plugins.tasks.service import filters, task_stats
from corral_plugins.tasks.service.queries import TaskQueries
from corral_plugins.tasks.shapes import TaskQuery, TaskStatsQuery

pytestmark = pytest.mark.sqlite

PLUGINS = ("agents", "cost", "llm", "tasks", "workers")
PAST, FUTURE = "2020-01-01T00:00:00Z", "2090-01-01T00:00:00Z"
SORTS = get_args(get_type_hints(TaskQuery)["sort"])
FILTERS = sorted({*TaskQuery.__struct_fields__} - {*PageQuery.__struct_fields__, "sort"})
STATISTICS = sorted(TaskStatsQuery.__struct_fields__)
# Each column gets its values independently of all others, by a digit of a number that looks random.
SPREAD = """UPDATE tasks_tasks SET priority = {3} % 4,
  tags = CASE WHEN rowid % 997 = 0 THEN '["rare"]' WHEN {5} % 3 = 0 THEN '["report","finance"]' ELSE '[]' END,
  source_type = CASE WHEN rowid % 997 = 1 THEN 'agent' WHEN {7} % 2 = 0 THEN 'api' ELSE 'user' END,
  agent_id = CASE WHEN {9} % 10 = 0 THEN :agent END, worker_id = CASE WHEN {11} % 4 = 0 THEN :worker END,
  parent_task_id = CASE WHEN {13} % 5 = 0 THEN :task END, workflow_run_id = CASE WHEN {15} % 5 = 0 THEN :run END"""
TAGS = """INSERT INTO tasks_tags (tag, created_at, task_id)
  SELECT each.value, t.created_at, t.id FROM tasks_tasks t, json_each(t.tags) each"""


class Table:
    """A kernel with a large table. `values` has, for each filter, values that few and that many tasks have."""

    def __init__(self, kit: Kit, world: World, size: int, known: dict[str, str]) -> None:
        self.kit, self.size = kit, size
        self.member, self.worker = (
            Client(kit.application.app, each.token) for each in (world.member, world.worker.client)
        )
        self.worker_id = world.worker.id
        nobody = new_id()
        self.values: dict[str, tuple[Any, ...]] = {
            "status_filter": ("pending", "completed", "failed"),
            "status": ("pending", "completed", "failed"),
            "priority": ("low", "critical"),
            "agent_id": (known["agent"], nobody),
            "search": ("needle", "nothing"),
            "tag": ("report", "rare", "nothing"),
            "worker_id": (known["worker"], nobody),
            "parent_task_id": (known["task"], nobody),
            "workflow_run_id": (known["run"], nobody),
            "source_type": ("user", "api", "agent", "trigger"),
            "created_by": (known["person"], nobody),
            "since": (PAST, FUTURE),
            "until": (PAST, FUTURE),
        }

    def lists(self) -> Iterator[dict[str, Any]]:
        """Every filter with every value, in every order, and pages far from the first."""
        for sort in SORTS:
            yield {"sort": sort}
            yield from ({"sort": sort, name: value} for name in FILTERS for value in self.values[name])
        yield from ({"offset": offset} for offset in (self.size // 2, self.size - 60))
        yield {"status": "completed", "offset": 1000}
        yield {"status": "completed", "priority": "low"}

    def statistics(self) -> Iterator[dict[str, Any]]:
        """The statistics of all tasks, by every filter, and by all filters."""
        yield {}
        yield from ({name: value} for name in STATISTICS for value in self.values[name])
        yield {name: self.values[name][0] for name in STATISTICS}


@pytest.fixture
async def table(tmp_path: Path, long_form: bool) -> AsyncIterator[Table]:
    size = 100_000 if long_form else 20_000
    async with make_kernel(tmp_path, plugins=PLUGINS) as kit:
        world = await World().build(kit)
        task_id = await world.task()  # the others are copies of it
        person = world.member.user["id"]
    known = {"agent": world.agent_id, "worker": world.worker.id, "task": task_id, "run": new_id(), "person": person}
    await asyncio.to_thread(fill, tmp_path, size, known)
    async with make_kernel(tmp_path, plugins=PLUGINS) as kit:
        yield Table(kit, world, size, known)


def fill(folder: Path, size: int, known: dict[str, str]) -> None:
    """Fill the table, with values that do not depend on each other or on the age of the task."""
    path = next(folder.rglob("corral.db"))
    seeds.fill(path, size)
    digits = {str(bit): f"(rowid * 2654435761 >> {bit})" for bit in range(3, 17, 2)}
    with sqlite3.connect(path) as connection:
        connection.execute(SPREAD.format(*[digits.get(str(n), "") for n in range(17)]), known)
        connection.execute("DELETE FROM tasks_tags")
        connection.execute(TAGS)
        connection.execute("DELETE FROM tasks_counters WHERE name LIKE 'status:%'")
        connection.execute(
            "INSERT INTO tasks_counters (name, shard, n) SELECT 'status:' || status || ':' || priority, 0, COUNT(*) "
            "FROM tasks_tasks GROUP BY status, priority"
        )
    connection.close()


STEPS = 100
MOST = 10
"""So many instructions of SQLite a task in the table are allowed. To count an index takes 4 to 5 for each entry, and to
read all tasks at least 15, most of them with the row of the task.
"""
FULL_SCAN = re.compile(r"SCAN (t1|tasks_tasks)$")


class Cost(NamedTuple):
    """The instructions that SQLite executed for a call, and the steps of its plans that read whole tables of tasks."""

    instructions: int
    scans: list[str]


def cost_of(call: Callable[[], Any]) -> Cost:
    """Run the call in a unit."""
    connection, counted = current().connection, itertools.count()
    statements: list[str] = []
    connection.set_progress_handler(lambda: next(counted) < 0, STEPS)
    connection.set_trace_callback(statements.append)
    try:
        call()
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_trace_callback(None)
    plans = [
        connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall() for sql in statements if sql.startswith("SELECT")
    ]
    scans = [detail for plan in plans for *_, detail in plan if FULL_SCAN.match(detail)]
    return Cost(next(counted) * STEPS, scans)


async def test_tasks_11_lists_and_statistics_do_not_read_the_table(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: what a busy machine does to the time says nothing about the statements."""
    for module, name in ((filters, "FEW"), (task_stats, "FEW"), (task_stats, "SAMPLE")):
        monkeypatch.setattr(module, name, getattr(module, name) * table.size // 100_000)
    queries, database = table.kit.kernel.container.get(TaskQueries), table.kit.kernel.database
    found = {}
    for shape, cases, read in (
        (TaskQuery, table.lists(), queries.list_tasks),
        (TaskStatsQuery, table.statistics(), queries.stats),
    ):
        for case in cases:
            query = _as_query(case, shape)
            call = functools.partial(cost_of, functools.partial(read, query, SYSTEM_PRINCIPAL))
            cost = await database.work(call, read=True)
            found[str(case)] = round(cost.instructions / table.size, 1), cost.scans
    assert {case: (steps, scans) for case, (steps, scans) in found.items() if steps > MOST or scans} == {}


def _as_query(case: dict[str, Any], shape: type[Any]) -> Any:
    hints = get_type_hints(shape)
    repeated = {name: [value] if "list" in str(hints[name]) else value for name, value in case.items()}
    return msgspec.convert(repeated, shape, strict=False)


async def test_tasks_11_a_large_table_stays_fast(table: Table, long_form: bool) -> None:
    if not long_form:
        pytest.skip("beside other tests the time says nothing; the test above counts what takes it")
    lists, stats, claims = [], [], []
    for _ in range(3):
        for case in table.lists():
            lists.append(await _timed(table.member.get(f"/tasks?limit=50&{urlencode(case)}")))
        for case in table.statistics():
            stats.append(await _timed(table.member.get(f"/tasks/stats?{urlencode(case)}")))
    for _ in range(60):
        claims.append(await _timed(table.worker.post(f"/workers/{table.worker_id}/claim", {})))
    assert (await table.member.get("/tasks/stats")).json()["by_status"]["assigned"] == 60
    assert (await table.member.get("/tasks")).json()["total"] == table.size + 1
    p95 = [statistics.quantiles(each, n=20)[-1] for each in (lists, stats, claims)]
    print("p95 of lists, statistics and claims in ms:", [round(1000 * each, 1) for each in p95])
    assert p95[0] <= 0.050
    assert p95[1] <= 0.050
    assert p95[2] <= 0.020


async def _timed(call: Any) -> float:
    began = time.perf_counter()
    assert (await call).status == 200
    return time.perf_counter() - began
