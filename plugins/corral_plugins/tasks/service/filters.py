"""Converts the filters of the task list to SQL conditions, and counts the matching tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import peewee
from msgspec import UNSET, UnsetType

from corral import clock
from corral_plugins.tasks.models import PRIORITIES, Task
from corral_plugins.tasks.service import statistics
from corral_plugins.tasks.service.tags import count_tagged, has_tag
from corral_plugins.tasks.shapes import TaskQuery

PLAIN = hashlib.sha256(b"{}").hexdigest()[:16]
"""The fingerprint of a query without filters."""
FEW = 8_000
"""The maximum number of matching tasks that are found with the index for a filter and then sorted.

If more tasks match, some of them are near the beginning of every list, so a page is found by reading the list in order.
"""
_IDS = ("agent_id", "worker_id", "parent_task_id", "workflow_run_id", "created_by")
_FREE = frozenset({"limit", "offset", "cursor"})


def is_unfiltered(query: TaskQuery, *, but: str = "sort") -> bool:
    """Return whether the query uses the default order and no filters.

    The field named by `but` is ignored.
    """
    return query.sort == "created" and _has_only(query, {"sort", but})


def conditions(query: TaskQuery, *, matches: int | None = None) -> list[Any]:
    """Return all filters except the search as SQL conditions. `matches` is the number of matching tasks, if known.

    If few tasks match, the database engine first finds the matching tasks and then sorts them. If many tasks match, the
    conditions make the engine read all tasks in sort order and skip those that do not match. Without these conditions,
    SQLite would sort the matching tasks even if they made up most of the table.
    """
    is_long = matches is not None and matches > FEW
    column = without_index if is_long and query.sort != "created" else with_index
    where = [_equals_any(column(Task.status), sorted(each)) for each in _statuses(query)]
    if isinstance(query.priority, list):
        where.append(_equals_any(column(Task.priority), [PRIORITIES.index(name) for name in query.priority]))
    for name in _IDS:
        value = getattr(query, name)
        if isinstance(value, str):
            where.append(column(getattr(Task, name)) == value.lower())
    if isinstance(query.source_type, str):
        where.append(column(Task.source_type) == query.source_type)
    if not isinstance(query.since, UnsetType):
        where.append(column(Task.created_at) >= clock.from_datetime(query.since))
    if not isinstance(query.until, UnsetType):
        where.append(column(Task.created_at) < clock.from_datetime(query.until))
    if isinstance(query.tag, list):
        where.append(has_tag(query.tag, in_order=is_long))
    return where


def counted_total(query: TaskQuery) -> int | None:
    """Return the number of matching tasks if it is quick to determine, else None.

    It is quick to determine if the query filters only by tag, or only by status and priority.
    """
    if _has_only(query, {"sort", "tag"}) and isinstance(query.tag, list):
        return count_tagged(query.tag)
    if not _has_only(query, {"sort", "status", "status_filter", "priority"}):
        return None
    statuses = _statuses(query)
    ranks = [PRIORITIES.index(name) for name in query.priority] if isinstance(query.priority, list) else None
    return sum(
        n
        for (status, rank), n in statistics.status_counts().items()
        if all(status in each for each in statuses) and (ranks is None or rank in ranks)
    )


def _has_only(query: TaskQuery, names: set[str]) -> bool:
    ignored = _FREE | names
    return all(getattr(query, name) is UNSET for name in query.__struct_fields__ if name not in ignored)


def _statuses(query: TaskQuery) -> list[set[str]]:
    return [set(each) for each in (query.status_filter, query.status) if isinstance(each, list)]


def _equals_any(column: Any, values: Sequence[Any]) -> Any:
    return column == values[0] if len(values) == 1 else column.in_(list(values))


def with_index(field: peewee.Field) -> Any:
    """Return the column itself, so that the database engine may use an index."""
    return field


def without_index(field: peewee.Field) -> Any:
    """Return an expression that has the value of the column but prevents the database engine from using an index."""
    return field + 0 if isinstance(field, peewee.IntegerField) else field.concat("")
