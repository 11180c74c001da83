"""The queues of claimable tasks: which an agent may serve, and their heads. Cost does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.database.unit import current
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import TASK_COLUMNS, TaskRow
from corral_plugins.tools.api import Tools
from corral_plugins.workers.api import WorkerFacts

# The queues that need tools and have a task: one look into a partial index for each, however many tasks there are.
_ONE_TOOLED = (
    "(SELECT t.{what} FROM tasks_tasks AS t WHERE t.status = 'pending' AND t.queue IS NOT NULL"
    " AND t.required_tools <> '[]' {which} ORDER BY t.queue LIMIT 1)"
)
_FIRST, _NEXT, _TOOLS = (
    _ONE_TOOLED.format(what=what, which=which)
    for what, which in (
        ("queue", ""),
        ("queue", "AND t.queue > found.queue"),
        ("required_tools", "AND t.queue = found.queue"),
    )
)
_TOOLED = (
    f"WITH RECURSIVE found(queue) AS (SELECT {_FIRST} UNION ALL"  # noqa: S608  (all literals)
    f" SELECT {_NEXT} FROM found WHERE found.queue IS NOT NULL)"
    f" SELECT queue, {_TOOLS} FROM found WHERE queue IS NOT NULL"
)
_ORDER = "rank DESC, deadline_key, available_at, created_at, id"
_HEAD = (
    "SELECT {what} FROM tasks_tasks WHERE status = 'pending' AND queue = {queue} {others}"
    " ORDER BY rank DESC, deadline_key, available_at, created_at, id LIMIT 1"
)
_OTHERS = "AND (created_by IS NULL OR created_by NOT IN (SELECT {each} FROM {list}))"
# The heads of many queues in one statement: one look into the index for each.
_SQLITE = (
    f"SELECT t.id, t.queue FROM json_each(?) AS q JOIN tasks_tasks AS t ON t.id = ({_HEAD})"  # noqa: S608  (all literals)
    " ORDER BY t.rank DESC, t.deadline_key, t.available_at, t.created_at, t.id LIMIT ?"
)
_POSTGRES = (
    f"SELECT t.id, t.queue FROM json_array_elements_text(%s::json) AS q(value) CROSS JOIN LATERAL ({_HEAD}) AS t"  # noqa: S608
    " ORDER BY t.rank DESC, t.deadline_key, t.available_at, t.created_at, t.id LIMIT %s"
)
_COLUMNS = "id, queue, rank, deadline_key, available_at, created_at"

_SQLITE_HEADS = _SQLITE.format(what="id", queue="q.value", others="")
_SQLITE_OTHERS = _SQLITE.format(what="id", queue="q.value", others=_OTHERS.format(each="value", list="json_each(?)"))
_POSTGRES_HEADS = _POSTGRES.format(what=_COLUMNS, queue="q.value", others="")
_POSTGRES_OTHERS = _POSTGRES.format(
    what=_COLUMNS, queue="q.value", others=_OTHERS.format(each="value", list="json_array_elements_text(%s::json)")
)

_TAKE = Statement(
    lambda p: Task.select(*TASK_COLUMNS).where((Task.id == p("id")) & (Task.status == "pending")).tuples()
)
_TAKE_FREE = Statement(
    lambda p: (
        Task.select(*TASK_COLUMNS)
        .where(rows.PENDING & (Task.queue == p("queue")))
        .order_by(Task.rank.desc(), Task.deadline_key, Task.available_at, Task.created_at, Task.id)
        .limit(1)
        .for_update(skip_locked=True)
        .tuples()
    )
)
_TAKE_THIS = Statement(
    lambda p: (
        Task.select(*TASK_COLUMNS)
        .where((Task.id == p("id")) & (Task.status == "pending"))
        .for_update(skip_locked=True)
        .tuples()
    )
)


def _tooled() -> list[tuple[str, str]]:
    """Queues that need tools and have a task, each with its tools as JSON."""
    return list(current().connection.execute(_TOOLED, ()).fetchall())


def has_tools(offered: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether all wanted tools are among the offered ones; `prefix.*` payloads every name below it."""
    names = set(offered)
    prefixes = tuple(name[:-1] for name in names if name.endswith(".*"))
    return all(tool in names or (bool(prefixes) and tool.startswith(prefixes)) for tool in wanted)


def missing_tools(offered: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """The wanted tools that are not among the offered ones."""
    return [tool for tool in wanted if not has_tools(offered, [tool])]


def brings(worker: WorkerFacts, tools: Sequence[str], service: Tools | None) -> bool:
    """Whether a run on this worker has the tools of a task: its own (none listed: all) and those of the server."""
    if not worker.tools:
        return True
    of_server = service.of_server() if service is not None else ()
    return has_tools([*worker.tools, *of_server], tools)


def served(agents: Sequence[AgentFacts], worker: WorkerFacts, service: Tools | None) -> dict[str, list[AgentFacts]]:
    """Queues that these agents may serve on this worker, each with its agents in their order."""
    found: dict[str, list[AgentFacts]] = {}
    for agent in agents:
        for base in (f"agent:{agent.id}", f"role:{agent.role}", "any"):
            found.setdefault(base, []).append(agent)
    kinds: dict[tuple[str, ...], int] = {}  # many agents have the same tools: each kind is judged once
    kind_of = {agent.id: kinds.setdefault(tuple(agent.enabled_tools), len(kinds)) for agent in agents}
    for queue, text in _tooled():
        of_base = found.get(queue.partition("#")[0])
        tools = msgspec.json.decode(text) if of_base else []
        if of_base and brings(worker, tools, service):
            kinds_able = {kind for enabled, kind in kinds.items() if has_tools(enabled, tools)}
            able = [agent for agent in of_base if kind_of[agent.id] in kinds_able]
            if able:
                found[queue] = able
    return found


def heads(queues: Iterable[str], *, limit: int, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """`(task id, queue)` of the first task of each queue, best first. `without`: not those of these requesters."""
    unit = current()
    names = msgspec.json.encode(list(queues)).decode()
    is_sqlite = unit.database.kind == "sqlite"
    if without:
        sql = _SQLITE_OTHERS if is_sqlite else _POSTGRES_OTHERS
        parameters: tuple[Any, ...] = (names, msgspec.json.encode(list(without)).decode(), limit)
    else:
        sql, parameters = _SQLITE_HEADS if is_sqlite else _POSTGRES_HEADS, (names, limit)
    return [(row[0], row[1]) for row in unit.connection.execute(sql, parameters).fetchall()]


def take(task_id: str, queue: str, *, exactly: bool) -> TaskRow | None:
    """Lock the head of a queue; None when it was taken meanwhile.

    On PostgreSQL claims in parallel skip what others have locked and take the next of the queue, unless `exactly`.
    """
    if current().database.kind == "sqlite":
        found = _TAKE.one({"id": task_id})
    elif exactly:
        found = _TAKE_THIS.one({"id": task_id})
    else:
        found = _TAKE_FREE.one({"queue": queue})
    return None if found is None else TaskRow(*found)


def first_of(names: Iterable[str], *, limit: int) -> list[str]:
    """Ids of the first tasks of these queues together, in claim order."""
    unit = current()
    filled = [queue for _, queue in heads(names, limit=limit)]
    if not filled:
        return []
    mark = "?" if unit.database.kind == "sqlite" else "%s"
    one = f"SELECT * FROM (SELECT {_COLUMNS} FROM tasks_tasks WHERE status = 'pending' AND queue = {mark} ORDER BY {_ORDER} LIMIT {mark}) AS q"  # noqa: S608, E501
    sql = f"SELECT id FROM ({' UNION ALL '.join([one] * len(filled))}) AS t ORDER BY {_ORDER} LIMIT {mark}"  # noqa: S608
    parameters = [value for queue in filled for value in (queue, limit)]
    return [row[0] for row in unit.connection.execute(sql, [*parameters, limit]).fetchall()]
