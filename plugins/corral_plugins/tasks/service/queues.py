"""The queues of claimable tasks: which an agent may serve, and their heads. Cost does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import current
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import ROW_COLUMNS, Row
from corral_plugins.tasks.sums import Toolset
from corral_plugins.tools.api import Tools
from corral_plugins.workers.api import WorkerFacts

MAX_TOOLSETS = 500

_TOOLSETS = Statement(lambda p: Toolset.select(Toolset.digest, Toolset.tools).limit(MAX_TOOLSETS).tuples())
_KEEP_TOOLSET = Statement(
    lambda p: Toolset.insert(
        {Toolset.digest: p("digest"), Toolset.tools: p("tools"), Toolset.used_at: p("now")}
    ).on_conflict(
        conflict_target=[Toolset.digest], update={Toolset.used_at: p("now")}, where=(Toolset.used_at < p("old"))
    )
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

_TAKE = Statement(lambda p: Task.select(*ROW_COLUMNS).where((Task.id == p("id")) & (Task.status == "pending")).tuples())
_TAKE_FREE = Statement(
    lambda p: (
        Task.select(*ROW_COLUMNS)
        .where(rows.PENDING & (Task.queue == p("queue")))
        .order_by(Task.rank.desc(), Task.deadline_key, Task.available_at, Task.created_at, Task.id)
        .limit(1)
        .for_update(skip_locked=True)
        .tuples()
    )
)
_TAKE_THIS = Statement(
    lambda p: (
        Task.select(*ROW_COLUMNS)
        .where((Task.id == p("id")) & (Task.status == "pending"))
        .for_update(skip_locked=True)
        .tuples()
    )
)


def keep_toolset(digest: str, tools: Sequence[str]) -> None:
    """Remember a set of tools that a new task requires."""
    now = clock.now()
    text = msgspec.json.encode(sorted(set(tools))).decode()
    _KEEP_TOOLSET.run({"digest": digest, "tools": text, "now": now, "old": clock.now(-86_400)})


def toolsets() -> dict[str, list[str]]:
    """Every set of tools that tasks require, by digest."""
    return {digest: msgspec.json.decode(tools) for digest, tools in _TOOLSETS.rows({})}


def has_tools(offered: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether all wanted tools are among the offered ones; `prefix.*` offers every name below it."""
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
    sets = {digest: tools for digest, tools in toolsets().items() if brings(worker, tools, service)}
    found: dict[str, list[AgentFacts]] = {}
    for agent in agents:
        able = [digest for digest, tools in sets.items() if has_tools(agent.enabled_tools, tools)]
        suffixes = ["", *(f"#{digest}" for digest in able)]
        for base in (f"agent:{agent.id}", f"role:{agent.role}", "any"):
            for suffix in suffixes:
                found.setdefault(base + suffix, []).append(agent)
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


def take(task_id: str, queue: str, *, exactly: bool) -> Row | None:
    """Lock the head of a queue; None when it was taken meanwhile.

    On PostgreSQL claims in parallel skip what others have locked and take the next of the queue, unless `exactly`.
    """
    if current().database.kind == "sqlite":
        found = _TAKE.one({"id": task_id})
    elif exactly:
        found = _TAKE_THIS.one({"id": task_id})
    else:
        found = _TAKE_FREE.one({"queue": queue})
    return None if found is None else Row(*found)


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
