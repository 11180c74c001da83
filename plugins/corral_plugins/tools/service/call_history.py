"""Queries on the stored tool calls, and the cleanup of abandoned calls."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.errors import NotFound
from corral.http.page import Order, Page, PageQuery, newest_first, paginate
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.service import repository
from corral_plugins.tools.service.executions import can_repeat, interrupted_error
from corral_plugins.tools.service.registry import Registry
from corral_plugins.tools.shapes import CallQuery, CallView


class CallHistory:
    """The stored tool calls. Runs in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def page(self, query: CallQuery, by: Principal) -> Page[CallView]:
        """List the calls that the caller may see, newest first."""
        found: Any = ToolCall.select().where(visible(ToolCall, by))
        if isinstance(query.agent_id, str):
            found = found.where(ToolCall.agent_id == query.agent_id.lower())
        if isinstance(query.tool, str):
            found = found.where(ToolCall.tool == query.tool)
        if isinstance(query.decision, list):
            found = found.where(ToolCall.decision.in_(query.decision))
        if isinstance(query.status, list):
            found = found.where(ToolCall.status.in_(query.status))
        if isinstance(query.since, datetime):
            found = found.where(ToolCall.created_at >= clock.from_datetime(query.since))
        return paginate(found, query, by, scope="tool-calls", order=newest_first(ToolCall), make=repository.view)

    def of_task(self, task_id: str, query: PageQuery, by: Principal) -> Page[CallView]:
        """List the calls of a task, oldest first. Raise `NotFound` if the caller may not see the task."""
        self._require_task(task_id, by)
        found = ToolCall.select().where(ToolCall.task_id == task_id)
        order = (Order(ToolCall.created_at, descending=False), Order(ToolCall.id, descending=False))
        return paginate(found, query, by, scope=f"tool-calls:{task_id}", order=order, make=repository.view)

    def one(self, task_id: str, call_id: str, by: Principal) -> CallView:
        """Return a call of a task. Raise `NotFound` if there is no such call or the caller may not see the task."""
        self._require_task(task_id, by)
        row = repository.find(task_id, call_id)
        if row is None:
            raise NotFound("This task has no tool call with this id.")
        return repository.view(row)

    def _require_task(self, task_id: str, by: Principal) -> None:
        if self.tasks is None:
            raise NotFound()
        self.tasks.get(task_id, by=by)

    def reap(self) -> int:
        """End calls whose process stopped and permits that were not reported. Return the number of ended calls."""
        found = repository.abandoned()
        for row in found:
            if row.status == "permitted":
                repository.end(row, "expired", error=interrupted_error(can_repeat=False))
            else:
                repository.end(row, "failed", error=interrupted_error(can_repeat(self._registry.find(row.tool))))
        return len(found)
