"""The queues of claimable tasks: finds the queues that an agent may serve, and the first tasks of queues.

The cost does not depend on the size of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from corral.database.dialect import execute, json_texts
from corral.database.statement import Statement
from corral.database.unit import locked
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tasks.models import Task, TaskRow
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.rows import TASK_COLUMNS
from corral_plugins.tools.api import Tools
from corral_plugins.workers.api import WorkerFacts

# The non-empty queues that require tools. Each costs one lookup in a partial index, however many tasks there are.
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
# Finds the first tasks of many queues with one index lookup for each queue. A `head` is a text of fixed
# width that sorts in claim order and ends with the id of the task; letters sort after digits.
_HEADS = (
    "SELECT q.value, COALESCE((SELECT (9 - rank) || deadline_key || available_at || created_at || id FROM tasks_tasks"  # noqa: S608
    f" WHERE status = 'pending' AND queue = q.value {{others}} ORDER BY {_ORDER} LIMIT 1), 'none') AS head"
    " FROM {queues} ORDER BY head LIMIT ?"
)
_OTHERS = "AND (created_by IS NULL OR created_by NOT IN (SELECT value FROM {users}))"
ID_LENGTH = 36
_COLUMNS = "id, queue, rank, deadline_key, available_at, created_at"

_TAKE_FREE = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(rows.PENDING & (Task.queue == p("queue")))
        .order_by(Task.rank.desc(), Task.deadline_key, Task.available_at, Task.created_at, Task.id)
        .limit(1),
        skip_locked=True,
    ).tuples()
)
_TAKE_THIS = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS).where((Task.id == p("id")) & (Task.status == "pending")), skip_locked=True
    ).tuples()
)


def _tooled() -> list[tuple[str, str]]:
    """Return the non-empty queues that require tools, each with its tools as JSON text."""
    return list(execute(_TOOLED).fetchall())


def has_tools(offered: Iterable[str], wanted: Iterable[str]) -> bool:
    """Return whether the offered tools include all wanted tools.

    `prefix.*` offers every name that starts with `prefix.`.
    """
    names = set(offered)
    prefixes = tuple(name[:-1] for name in names if name.endswith(".*"))
    return all(tool in names or (bool(prefixes) and tool.startswith(prefixes)) for tool in wanted)


def missing_tools(offered: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Return the wanted tools that are not offered."""
    return [tool for tool in wanted if not has_tools(offered, [tool])]


def worker_has_tools(worker: WorkerFacts, tools: Sequence[str], service: Tools | None) -> bool:
    """Return whether a run on this worker can use these tools, which the server or the worker provides.

    A worker that lists no tools provides all tools.
    """
    if not worker.tools:
        return True
    of_server = service.of_server() if service is not None else ()
    return has_tools([*worker.tools, *of_server], tools)


def served(agents: Sequence[AgentFacts], worker: WorkerFacts, service: Tools | None) -> dict[str, list[AgentFacts]]:
    """Return the queues that these agents may serve on this worker, each with its agents in the given order."""
    found: dict[str, list[AgentFacts]] = {}
    for agent in agents:
        for base in (f"agent:{agent.id}", f"role:{agent.role}", "any"):
            found.setdefault(base, []).append(agent)
    kinds: dict[tuple[str, ...], int] = {}  # many agents have the same tools, so each set of tools is checked once
    kind_of = {agent.id: kinds.setdefault(tuple(agent.enabled_tools), len(kinds)) for agent in agents}
    for queue, text in _tooled():
        of_base = found.get(queue.partition("#")[0])
        tools = msgspec.json.decode(text) if of_base else []
        if of_base and worker_has_tools(worker, tools, service):
            kinds_able = {kind for enabled, kind in kinds.items() if has_tools(enabled, tools)}
            able = [agent for agent in of_base if kind_of[agent.id] in kinds_able]
            if able:
                found[queue] = able
    return found


def heads(queues: Iterable[str], *, limit: int, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return `(task id, queue)` of the first task of each queue, best first. `without` excludes these requesters."""
    others, parameters = "", [rows.as_text(list(queues)), limit]
    if without:
        others, parameters = _OTHERS.format(users=json_texts("u")), [rows.as_text(list(without)), *parameters]
    found = execute(_HEADS.format(queues=json_texts("q"), others=others), parameters).fetchall()
    return [(head[-ID_LENGTH:], queue) for queue, head in found if head != "none"]


def take(task_id: str, queue: str, *, exactly: bool) -> TaskRow | None:
    """Lock the first task of a queue. Return None if a concurrent claim took it.

    Unless `exactly` is set, rows that concurrent claims have locked are skipped, and the next task of the queue is
    taken.
    """
    found = _TAKE_THIS.one({"id": task_id}) if exactly else _TAKE_FREE.one({"queue": queue})
    return None if found is None else TaskRow(*found)


def first_of(names: Iterable[str], *, limit: int) -> list[str]:
    """Return the ids of the first tasks of all these queues together, in claim order."""
    filled = [queue for _, queue in heads(names, limit=limit)]
    if not filled:
        return []
    one = (
        f"SELECT * FROM (SELECT {_COLUMNS} FROM tasks_tasks WHERE status = 'pending' AND queue = ?"  # noqa: S608
        f" ORDER BY {_ORDER} LIMIT ?) AS q"
    )
    sql = f"SELECT id FROM ({' UNION ALL '.join([one] * len(filled))}) AS t ORDER BY {_ORDER} LIMIT ?"  # noqa: S608
    parameters = [value for queue in filled for value in (queue, limit)]
    return [row[0] for row in execute(sql, [*parameters, limit]).fetchall()]
