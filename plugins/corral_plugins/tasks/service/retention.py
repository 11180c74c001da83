"""Deletes tasks with all their data, and deletes rows whose retention period has ended."""

from __future__ import annotations

from peewee import SQL

from corral import clock
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import TaskDeleted
from corral_plugins.tasks.models import Attempt, Comment, Dependency, HourlyRollup, LogLine, Task, TaskRow, WorkerSignal
from corral_plugins.tasks.service import queries, rows, statistics
from corral_plugins.tasks.service.dead_letters import TaskDeadLetters
from corral_plugins.tasks.service.tags import remove_tags
from corral_plugins.tasks.service.transitions import publish_task_event

TASKS_AT_ONCE, ROWS_AT_ONCE = 100, 500
DAY = 86_400


def delete_task(row: TaskRow) -> None:
    """Delete a locked task that has ended. A background job deletes its attempts, logs and comments."""
    queries.remove_from_index(row)
    remove_tags(row.id)
    if row.status != "completed":  # the tasks that depend on this one can no longer be retried
        dependents = Dependency.select(Dependency.task_id).where(Dependency.needs_id == row.id)
        ended = Task.finished_at.is_null(False) & Task.failed_dependency_id.is_null()
        Task.update(failed_dependency_id=row.id).where(Task.id.in_(dependents) & ended).execute()
    Task.delete().where((Task.id == row.id) & (Task.status == row.status)).execute()
    # Rows for the dependents of this task stay until the dependents are deleted: a job may still have to update them.
    Dependency.delete().where(Dependency.task_id == row.id).execute()
    statistics.count_transition(row.status, None, row.priority, row.created_by)
    queries.decrement_anchor(row.created_at, row.id)
    enqueue("tasks.purge", task_id=row.id)
    publish_task_event(TaskDeleted, row, row.status)


def purge_rows(task_id: str) -> int:
    """Delete at most 500 attempts, 500 log lines and 500 comments of a deleted task.

    Return the number of deleted rows.
    """
    deleted = 0
    for model in (LogLine, Comment, Attempt):
        some = model.select(model.id).where(model.task_id == task_id).limit(ROWS_AT_ONCE)
        deleted += model.delete().where(model.id.in_(some)).execute()
    return deleted


class TaskRetention:
    """Deletes rows whose retention period has ended. Every method runs in the caller's unit of work."""

    def __init__(self, settings: Settings, dead_letters: TaskDeadLetters) -> None:
        self._settings, self._dead_letters = settings, dead_letters

    def delete_expired_rows(self) -> int:
        """Delete a batch of tasks older than `tasks.retention_days`, a batch of old signals, and old hourly statistics.

        Return the number of deleted rows.
        """
        deleted = 0
        days = self._settings.get(declared.RETENTION_DAYS)
        if days is not None:
            old = SQL("finished_at IS NOT NULL") & (Task.finished_at < clock.now(-days * DAY))
            found = rows.lock_tasks(old, TASKS_AT_ONCE)
            for row in found:
                self._dead_letters.close(row, by=None, is_retry=False)
                delete_task(row)
            deleted += len(found)
        old_signals = WorkerSignal.select(WorkerSignal.seq).where(WorkerSignal.created_at < clock.now(-DAY))
        deleted += WorkerSignal.delete().where(WorkerSignal.seq.in_(old_signals.limit(ROWS_AT_ONCE))).execute()
        deleted += HourlyRollup.delete().where(HourlyRollup.hour < clock.now(-400 * DAY)[:13]).execute()
        return int(deleted)
