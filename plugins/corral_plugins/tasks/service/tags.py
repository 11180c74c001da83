"""Stores each tag of a task in a separate row, so that task lists can be filtered by tag."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import peewee

from corral.database.statement import Parameter, Statement
from corral_plugins.tasks.models import Task, TaskTag

_STORED = Statement(lambda p: Task.select(Task.created_at, Task.tags).where(Task.id == p("id")).tuples())


@functools.cache
def _insert(size: int) -> Statement:
    """Return a statement that adds `size` tags to a task."""

    def build(p: Parameter) -> peewee.Query:
        values = [
            {TaskTag.tag: p(f"tag{n}"), TaskTag.created_at: p("created_at"), TaskTag.task_id: p("id")}
            for n in range(size)
        ]
        return TaskTag.insert_many(values)

    return Statement(build)


def add_tags(task_id: str, created_at: str, tags: Sequence[str]) -> None:
    """Add the tags of a task to the table, so that the task can be found by each tag."""
    different = sorted({*tags})
    if different:
        named = {f"tag{n}": tag for n, tag in enumerate(different)}
        _insert(len(different)).run({"created_at": created_at, "id": task_id, **named})


def remove_tags(task_id: str) -> None:
    """Remove the tags of a locked task from the table. Call this function before the task's tags change."""
    found = _STORED.one({"id": task_id})
    if found is not None and found[1] != "[]":
        of_task = (TaskTag.created_at == found[0]) & (TaskTag.task_id == task_id)
        TaskTag.delete().where(TaskTag.tag.in_(msgspec.json.decode(found[1])) & of_task).execute()


def count_tagged(tags: Sequence[str]) -> int:
    """Return the number of tasks that have at least one of the tags."""
    found = TaskTag.select(TaskTag.task_id).where(TaskTag.tag.in_(list(tags)))
    return int(found.count() if len(tags) == 1 else found.distinct().count())


def has_tag(tags: Sequence[str], *, in_order: bool) -> Any:
    """Return the SQL condition for tasks that have at least one of the tags.

    With `in_order`, the database engine reads the list in order and looks up the tags of each task. Otherwise, it
    starts with the tasks that have the tags.
    """
    tagged = TaskTag.select(TaskTag.task_id).where(TaskTag.tag.in_(list(tags)))
    if not in_order:
        return Task.id.in_(tagged)
    return peewee.fn.EXISTS(tagged.where((TaskTag.created_at == Task.created_at) & (TaskTag.task_id == Task.id)))
