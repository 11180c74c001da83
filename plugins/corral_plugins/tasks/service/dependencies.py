"""Effects of the end of a task on the tasks that depend on it and on its children."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.jobs.job import enqueue
from corral_plugins.tasks.events import TaskFailed, TaskUpdated
from corral_plugins.tasks.models import STATUSES, Dependency, Task
from corral_plugins.tasks.service import rollups, rows
from corral_plugins.tasks.service.rows import TASK_COLUMNS, TaskRow
from corral_plugins.tasks.service.transitions import Transitions, failure, publish, transition

BATCH_SIZE = 200
"""So many dependents or children are followed in one unit; a job follows the rest."""


def _only(status: str) -> Any:
    """A condition that no index serves: the few dependents are to be found by their ids, not among all of a status."""
    return Task.status.not_in([each for each in STATUSES if each != status])


_DEPENDENTS = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(
            _only("blocked")
            & (Task.id > p("after"))
            & Task.id.in_(Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")))
        )
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_FAILED_BY = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(
            _only("failed")
            & (Task.failed_dependency_id == p("id"))
            & Task.id.in_(Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")))
        )
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_HAS_DEPENDENTS = Statement(
    lambda p: Dependency.select(Dependency.task_id).where(Dependency.needs_id == p("id")).limit(1).tuples()
)
_CHILDREN = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where((Task.parent_task_id == p("id")) & rows.UNCANCELLED)
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_OPEN_NEEDS = Statement(
    lambda p: (
        Dependency.select(Dependency.task_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & (Task.status != "completed"))
        .limit(1)
        .tuples()
    )
)
_DEAD_NEED = Statement(
    lambda p: (
        Dependency.select(Dependency.needs_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & Task.status.in_(("failed", "cancelled")))
        .order_by(Dependency.needs_id)
        .limit(1)
        .tuples()
    )
)


class Dependencies:
    """Dependents and children. Rows are locked before they are judged: two ends at once cannot miss each other."""

    def __init__(self, transitions: Transitions) -> None:
        self._transitions = transitions

    def unblock(self, task_id: str, after: str = "") -> None:
        """A task was completed: what waited for it alone is pending now. `after`: the last one judged."""
        if _HAS_DEPENDENTS.one({"id": task_id}) is None:
            return
        found = [TaskRow(*row) for row in _DEPENDENTS.rows({"id": task_id, "after": after})]
        for dependent in found:
            if _OPEN_NEEDS.one({"id": dependent.id}) is None:
                available = max(dependent.available_at, clock.now())
                transition(
                    dependent,
                    "pending",
                    event=TaskUpdated,
                    **self._transitions.queued(dependent, available_at=available),
                )
        if len(found) == BATCH_SIZE:
            enqueue("tasks.unblock", task_id=task_id, after=found[-1].id)

    def fail_dependents(self, task_id: str) -> None:
        """A task failed or was cancelled: what waits for it fails, and what waits for that."""
        waiting, failed = [task_id], 0
        while waiting:
            needed = waiting.pop()
            if _HAS_DEPENDENTS.one({"id": needed}) is None:
                continue
            for row in _DEPENDENTS.rows({"id": needed, "after": ""}):
                dependent = TaskRow(*row)
                error = _needs_dead(needed)
                transition(
                    dependent,
                    "failed",
                    event=TaskFailed,
                    named={"error": error},
                    error=error,
                    finished_at=clock.now(),
                    failed_dependency_id=needed,
                )
                rollups.count_end(completed=False, duration_ms=None)
                waiting.append(dependent.id)
                failed += 1
            if failed >= BATCH_SIZE:
                for rest in [needed, *waiting]:
                    enqueue("tasks.fail_dependents", task_id=rest)
                return

    def reblock(self, task_id: str) -> None:
        """A task is tried again: what failed only because of it waits for it again, and what failed because of that."""
        waiting, count = [task_id], 0
        while waiting:
            needed = waiting.pop()
            if _HAS_DEPENDENTS.one({"id": needed}) is None:
                continue
            for row in _FAILED_BY.rows({"id": needed}):
                dependent, count = TaskRow(*row), count + 1
                dead = _DEAD_NEED.one({"id": dependent.id})
                if dead is not None:  # it stays failed, now because of the other one
                    rows.change(dependent, {"failed_dependency_id": dead[0], "error": _needs_dead(dead[0])})
                    publish(TaskUpdated, dependent, dependent.status)
                    continue
                transition(
                    dependent, "blocked", event=TaskUpdated, error=None, finished_at=None, failed_dependency_id=None
                )
                waiting.append(dependent.id)
            if count >= BATCH_SIZE:
                for rest in [needed, *waiting]:
                    enqueue("tasks.reblock", task_id=rest)
                return

    def each_child(self, task_id: str, act: Callable[[TaskRow], None]) -> None:
        """Do something with every child that has not ended and was not cancelled for good."""
        found = [TaskRow(*row).id for row in _CHILDREN.rows({"id": task_id})]
        for child_id in found:
            child = rows.lock(child_id)  # the end of another child may have ended this one
            if rows.is_uncancelled(child):
                act(child)
        if len(found) == BATCH_SIZE:
            enqueue("tasks.cancel_children", task_id=task_id)


def _needs_dead(needed: str) -> dict[str, Any]:
    """The error of a task that waited for one that did not complete."""
    told = f"The task {needed}, which this one needs, did not complete."
    return failure("dependency_failed", "dependency_failed", told, retryable=False, attempt=0)
