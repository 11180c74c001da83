"""The tools that agents use to read a task, delegate a task, and ask a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from corral import clock
from corral.errors import NotFound
from corral.schema.conversion import convert
from corral_plugins.tasks.api import NewTask, Origin
from corral_plugins.tasks.models import PRIORITIES
from corral_plugins.tasks.service.creation import TaskCreation
from corral_plugins.tasks.service.queries import TaskQueries
from corral_plugins.tasks.service.rows import TaskViews, find_readable_task
from corral_plugins.tasks.service.runs import TaskRuns
from corral_plugins.tasks.shapes import TaskQuery, TaskView
from corral_plugins.tasks.worker_protocol_shapes import AskedInput
from corral_plugins.tools.api import Json, ResultLater, Tool, ToolContext, ToolOutput, ToolSet

SHOWN = (
    "id",
    "title",
    "status",
    "priority",
    "agent_id",
    "attempt",
    "progress",
    "waiting_for",
    "result",
    "error",
    "artifacts",
    "created_at",
    "finished_at",
)
LISTED = ("id", "title", "status", "priority", "agent_id", "attempt", "error", "created_at", "finished_at")
FINAL = ("completed", "failed", "cancelled")
ID = {"type": "string", "format": "uuid"}
NAMES = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 200}, "maxItems": 50}

GET_SCHEMA: Json = {
    "type": "object",
    "properties": {"task_id": {**ID, "description": "The task to read."}},
    "required": ["task_id"],
    "additionalProperties": False,
}
LIST_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "hours": {
            "type": "integer",
            "minimum": 1,
            "maximum": 720,
            "description": "The number of past hours whose tasks are listed.",
        },
        "status": {"enum": list(FINAL), "description": "The final status of the listed tasks."},
        "limit": {"type": "integer", "minimum": 1, "maximum": 200},
    },
    "additionalProperties": False,
}
CREATE_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 200},
        "description": {"type": "string", "maxLength": 16384},
        "instructions": {"type": "string", "maxLength": 65536, "description": "The instructions for the agent."},
        "input": {"type": "object", "description": "The input of the task, as data for the agent."},
        "priority": {"enum": list(PRIORITIES)},
        "agent_id": {
            **ID,
            "description": "The agent for the task. If it is absent, any agent with the role agent_role, or any "
            "agent, may run the task.",
        },
        "agent_role": {"type": "string", "maxLength": 64},
        "deadline": {"type": "string", "format": "date-time"},
        "required_tools": NAMES,
        "allowed_tools": NAMES,
        "depends_on": {"type": "array", "items": ID, "maxItems": 50},
        "timeout_seconds": {"type": "integer", "minimum": 10, "maximum": 604_800},
        "max_cost_usd": {"type": "number", "minimum": 0, "maximum": 1_000_000_000},
        "output_schema": {"type": "object"},
    },
    "required": ["title"],
    "additionalProperties": False,
}
ASK_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string", "minLength": 1, "maxLength": 16384, "description": "The question."},
        "schema": {"type": "object", "description": "A JSON Schema that the answer must match."},
    },
    "required": ["prompt"],
    "additionalProperties": False,
}
AGENTS_CONFIG: Json = {
    "type": "object",
    "properties": {"agent_ids": {"type": "array", "items": ID, "maxItems": 100}},
    "additionalProperties": False,
}


class AgentTools:
    """Implements the task tools for agents.

    Each method runs in the unit of work that stores the result of the tool call.
    """

    def __init__(self, creation: TaskCreation, runs: TaskRuns, views: TaskViews, queries: TaskQueries) -> None:
        self._creation, self._runs, self._views, self._queries = creation, runs, views, queries

    def read_task(self, context: ToolContext, arguments: Json) -> ToolOutput:
        """Read a task. The content of a tainted task is marked as untrusted, unless the task is the caller's own."""
        body = self._views.encoded_task(arguments["task_id"].lower()).body
        task: Json = msgspec.json.decode(body)
        shown = {name: task[name] for name in SHOWN}
        is_foreign = task["tainted"] and task["id"] != context.task_id
        return ToolOutput(value=shown, untrusted=(f"task:{task['id']}",) if is_foreign else ())

    def list_tasks(self, context: ToolContext, arguments: Json) -> ToolOutput:
        """List tasks, newest first, with their costs. The content of tainted tasks is marked as untrusted."""
        since = clock.now(-3600.0 * arguments.get("hours", 24))
        given = {"since": since, "limit": arguments.get("limit", 50)}
        given |= {"status_filter": [arguments["status"]]} if "status" in arguments else {}
        page = self._queries.list_tasks(convert(TaskQuery, given), context.caller)
        items: list[Json] = msgspec.json.decode(msgspec.json.encode(page.items))
        shown = [{**{name: task[name] for name in LISTED}, "cost_usd": task["cost"]["cost_usd"]} for task in items]
        untrusted = tuple(f"task:{task['id']}" for task in items if task["tainted"] and task["id"] != context.task_id)
        return ToolOutput(value={"items": shown, "total": page.total}, untrusted=untrusted)

    def create_subtask(self, context: ToolContext, arguments: Json) -> Json:
        """Create a task for work that the calling agent delegates."""
        new, origin = convert(NewTask, arguments), Origin(parent_task_id=context.task_id)
        made = self._creation.create(new, by=context.caller, source=None, origin=origin)
        task = msgspec.json.decode(made.body, type=TaskView)
        warnings = task.warnings if isinstance(task.warnings, list) else []
        return {"task_id": task.id, "status": task.status, "warnings": warnings}

    def ask_person(self, context: ToolContext, arguments: Json) -> ResultLater:
        """Ask a person a question.

        The run ends, and the task waits for the answer. The answer becomes the result of this tool call.
        """
        asked = convert(AskedInput, arguments)
        self._runs.ask_person(context.task_id, context.lease_id, asked, call_id=context.call_id)
        return ResultLater()


class TaskTools(ToolSet[AgentTools]):
    """The tools that the `tasks` plugin contributes."""

    def all(self) -> list[Tool]:
        """Return all tools."""
        return [
            Tool(
                name="tasks.get",
                title="Read a task",
                description="Get the status, result and error of a task.",
                risk="read",
                schema=GET_SCHEMA,
                permission="tasks.read",
                idempotent=True,
                is_visible=_can_see_task,
                run=lambda context, arguments: self.implementation.read_task(context, arguments),
            ),
            Tool(
                name="tasks.list",
                title="List tasks",
                description="List recent tasks with their status, error and cost, newest first.",
                risk="read",
                schema=LIST_SCHEMA,
                permission="tasks.read",
                idempotent=True,
                run=lambda context, arguments: self.implementation.list_tasks(context, arguments),
            ),
            Tool(
                name="tasks.create",
                title="Delegate a task",
                description="Create a task for another agent. Read the result of the task later with tasks.get.",
                risk="write",
                schema=CREATE_SCHEMA,
                permission="tasks.write",
                config_schema=AGENTS_CONFIG,
                admits=_allows_agent,
                run=lambda context, arguments: self.implementation.create_subtask(context, arguments),
            ),
            Tool(
                name="human.ask",
                title="Ask a person",
                description="Send a question to the person who requested the task, and wait for the answer.",
                risk="write",
                schema=ASK_SCHEMA,
                permission="tasks.write",
                run=lambda context, arguments: self.implementation.ask_person(context, arguments),
            ),
        ]


def _can_see_task(context: ToolContext, arguments: Json) -> bool:
    try:
        find_readable_task(arguments["task_id"].lower(), context.caller)
    except NotFound:
        return False
    return True


def _allows_agent(config: Mapping[str, Any], arguments: Json) -> bool:
    """Return whether the tool's configuration allows the calling agent to create this task.

    If the configuration lists agents, the task must be assigned to one of these agents.
    """
    agents = config.get("agent_ids")
    return agents is None or str(arguments.get("agent_id")).lower() in [each.lower() for each in agents]
