"""Updates the dependents and children of a task when the task ends or is retried.

Rows are locked before they are checked, so that two tasks that end at the same time both take effect. All functions run
in the caller's unit of work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corral import clock
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.jobs.job import enqueue
from corral_plugins.tasks.events import TaskFailed, TaskUpdated
from corral_plugins.tasks.models import STATUSES, Dependency, Task, TaskRow
from corral_plugins.tasks.service import rollups, rows
from corral_plugins.tasks.service.rows import TASK_COLUMNS
from corral_plugins.tasks.service.transitions import failure, publish, queued, transition

BATCH_SIZE = 200
"""The number of dependents or children after which a unit of work stops and a background job handles the rest."""


def _only(status: str) -> Any:
    """Return the condition that a task has this status.

    The condition is written so that no index on the status matches, because the few dependents are found faster by id.
    """
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
        .where((Task.parent_task_id == p("id")) & rows.CAN_CONTINUE)
        .order_by(Task.id)
        .limit(BATCH_SIZE)
    ).tuples()
)
_OPEN_DEPENDENCY = Statement(
    lambda p: (
        Dependency.select(Dependency.task_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & (Task.status != "completed"))
        .limit(1)
        .tuples()
    )
)
_DEAD_DEPENDENCY = Statement(
    lambda p: (
        Dependency.select(Dependency.needs_id)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where((Dependency.task_id == p("id")) & Task.status.in_(("failed", "cancelled")))
        .order_by(Dependency.needs_id)
        .limit(1)
        .tuples()
    )
)


def unblock(task_id: str, after: str = "") -> None:
    """Queue the dependents of a completed task that have no other open dependency.

    `after` is the id of the last dependent that was already checked.
    """
    if _HAS_DEPENDENTS.one({"id": task_id}) is None:
        return
    found = [TaskRow(*row) for row in _DEPENDENTS.rows({"id": task_id, "after": after})]
    for dependent in found:
        if _OPEN_DEPENDENCY.one({"id": dependent.id}) is None:
            available = max(dependent.available_at, clock.now())
            transition(dependent, "pending", **queued(dependent, available_at=available))
    if len(found) == BATCH_SIZE:
        enqueue("tasks.unblock", task_id=task_id, after=found[-1].id)


def fail_dependents(task_id: str) -> None:
    """Fail the dependents of a failed or cancelled task, and their dependents in turn."""
    waiting, failed = [task_id], 0
    while waiting:
        needed = waiting.pop()
        if _HAS_DEPENDENTS.one({"id": needed}) is None:
            continue
        for row in _DEPENDENTS.rows({"id": needed, "after": ""}):
            dependent, error = TaskRow(*row), _dependency_failed(needed)
            transition(
                dependent,
                "failed",
                event=TaskFailed,
                fields={"error": error},
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


def reblock(task_id: str) -> None:
    """Block the tasks that failed only because of a task that is now retried, and their failed dependents in turn."""
    waiting, count = [task_id], 0
    while waiting:
        needed = waiting.pop()
        if _HAS_DEPENDENTS.one({"id": needed}) is None:
            continue
        for row in _FAILED_BY.rows({"id": needed}):
            dependent, count = TaskRow(*row), count + 1
            dead = _DEAD_DEPENDENCY.one({"id": dependent.id})
            if dead is not None:  # another dependency is dead, so the task stays failed because of that one
                rows.change(dependent, {"failed_dependency_id": dead[0], "error": _dependency_failed(dead[0])})
                publish(TaskUpdated, dependent, dependent.status)
                continue
            transition(dependent, "blocked", error=None, finished_at=None, failed_dependency_id=None)
            waiting.append(dependent.id)
        if count >= BATCH_SIZE:
            for rest in [needed, *waiting]:
                enqueue("tasks.reblock", task_id=rest)
            return


def each_child(task_id: str, act: Callable[[TaskRow], None]) -> None:
    """Call `act` with every child that has not ended and was not permanently cancelled."""
    found = [TaskRow(*row).id for row in _CHILDREN.rows({"id": task_id})]
    for child_id in found:
        child = rows.lock(child_id)  # ending another child may have ended this one
        if rows.can_continue(child):
            act(child)
    if len(found) == BATCH_SIZE:
        enqueue("tasks.cancel_children", task_id=task_id)


def _dependency_failed(needed: str) -> dict[str, Any]:
    message = f"The task {needed}, which this one needs, did not complete."
    return failure("dependency_failed", "dependency_failed", message, retryable=False, attempt=0)
