"""Places in the list of all tasks, so that a page far from its ends is found without counting what is before it.

A mark is written for every so many tasks that lie in the settled past, where no commit can put another one. Between the
last mark and now there are only as many tasks as came in the last minute, and the rest of one interval.
"""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.sums import Mark

EVERY = 5000
SETTLED_SECONDS = 60
BEFORE_ALL = ("", "")

_MARKS = Statement(
    lambda p: Mark.select(Mark.created_at, Mark.task_id, Mark.n).order_by(Mark.created_at, Mark.task_id).tuples()
)
_LAST = Statement(
    lambda p: (
        Mark.select(Mark.created_at, Mark.task_id)
        .order_by(Mark.created_at.desc(), Mark.task_id.desc())
        .limit(1)
        .tuples()
    )
)
_NTH_AFTER = Statement(
    lambda p: (
        Task.select(Task.created_at, Task.id)
        .where(_after(p("created_at"), p("id")))
        .order_by(Task.created_at, Task.id)
        .limit(1)
        .offset(p("offset"))
        .tuples()
    )
)
_INSERT = Statement(
    lambda p: Mark.insert({Mark.created_at: p("created_at"), Mark.task_id: p("id"), Mark.n: EVERY}).on_conflict_ignore()
)
_LESS = Statement(
    lambda p: Mark.update({Mark.n: Mark.n - 1}).where(
        (Mark.created_at == p("mark_at")) & (Mark.task_id == p("mark_id"))
    )
)
_COVERING = Statement(
    lambda p: (
        Mark.select(Mark.created_at, Mark.task_id)
        .where((Mark.created_at > p("created_at")) | ((Mark.created_at == p("created_at")) & (Mark.task_id >= p("id"))))
        .order_by(Mark.created_at, Mark.task_id)
        .limit(1)
        .tuples()
    )
)


def _after(created_at: Any, task_id: Any) -> Any:
    return (Task.created_at >= created_at) & (
        (Task.created_at > created_at) | ((Task.created_at == created_at) & (Task.id > task_id))
    )


def place(position: int) -> tuple[str, str] | None:
    """The key of the task that has exactly `position` older ones; None: there is none."""
    start, left = BEFORE_ALL, position
    for created_at, task_id, n in _MARKS.rows({}):
        if n > left:
            break
        start, left = (created_at, task_id), left - n
    found = _NTH_AFTER.one({"created_at": start[0], "id": start[1], "offset": left})
    return None if found is None else (found[0], found[1])


def extend() -> bool:
    """Write the next mark, if the settled past holds enough tasks for it; whether it did."""
    last = _LAST.one({}) or BEFORE_ALL
    found = _NTH_AFTER.one({"created_at": last[0], "id": last[1], "offset": EVERY - 1})
    if found is None or found[0] > clock.now(-SETTLED_SECONDS):
        return False
    _INSERT.run({"created_at": found[0], "id": found[1]})
    return True


def removed(created_at: str, task_id: str) -> None:
    """A task is deleted: one less before the mark that comes after it."""
    mark = _COVERING.one({"created_at": created_at, "id": task_id})
    if mark is not None:
        _LESS.run({"mark_at": mark[0], "mark_id": mark[1]})
