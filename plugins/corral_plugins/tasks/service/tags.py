"""Stores each tag of a task in a separate row, so that task lists can be filtered by tag."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import msgspec
import peewee

from corral.database.statement import Statement
from corral.database.unit import collect
from corral.errors import Invalid
from corral_plugins.tasks.models import Task, TaskTag

_STORED = Statement(lambda p: Task.select(Task.created_at, Task.tags).where(Task.id == p("id")).tuples())


_INSERT = Statement(lambda p: TaskTag.insert(tag=p("tag"), created_at=p("created_at"), task_id=p("id")))
_DELETE = Statement(
    lambda p: TaskTag.delete().where(
        (TaskTag.tag == p("tag")) & (TaskTag.created_at == p("created_at")) & (TaskTag.task_id == p("id"))
    )
)


def checked_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags in the given order, without surrounding white space and without duplicates.

    Raise `Invalid` if a tag is blank.
    """
    found = [tag.strip() for tag in tags]
    for place, tag in enumerate(found):
        if not tag:
            raise Invalid.at(f"/tags/{place}", "too_short", "A tag must contain a character other than white space.")
    return list(dict.fromkeys(found))


def add_tags(task_id: str, created_at: str, tags: Sequence[str]) -> None:
    """Store the tags of a task at the end of the transaction, so that the task can be found by each tag."""
    if tags:
        collect(_write, (_INSERT, task_id, created_at, tags))


def remove_tags(task_id: str) -> None:
    """Delete the stored tags of a locked task. Call this function before the task's tags change."""
    for created_at, tags in _STORED.rows({"id": task_id}):
        collect(_write, (_DELETE, task_id, created_at, msgspec.json.decode(tags)))


def _write(changes: list[tuple[Statement, str, str, Sequence[str]]]) -> None:
    """Write changes in the given order, because a transaction may change the tags of a task more than once."""
    for statement, group in itertools.groupby(changes, key=operator.itemgetter(0)):
        statement.run_many(
            {"tag": tag, "created_at": created_at, "id": task_id}
            for _, task_id, created_at, tags in group
            for tag in sorted({*tags})
        )


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
