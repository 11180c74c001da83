"""The action `create_task`, which lets triggers create tasks, and the taint check for tasks named in events."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Unavailable
from corral.schema.conversion import convert
from corral_plugins.agents.api import Agents
from corral_plugins.tasks.api import NewTask, Origin
from corral_plugins.tasks.models import PRIORITIES, TERMINAL, Task
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.creation import TaskCreation, find_named_agent
from corral_plugins.triggers.api import FireContext, TaintCheck, TriggerAction

Json = dict[str, Any]
NAMES = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 200}, "maxItems": 50}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 200},
        "instructions": {"type": "string", "maxLength": 65536},
        "description": {"type": "string", "maxLength": 16384},
        "agent_id": {"type": ["string", "null"], "format": "uuid"},
        "agent_role": {"type": ["string", "null"], "maxLength": 64},
        "priority": {"enum": list(PRIORITIES)},
        "input": {"type": "object"},
        "required_tools": NAMES,
        "allowed_tools": NAMES,
        "max_cost_usd": {"type": ["number", "null"], "minimum": 0},
        "deadline_seconds": {"type": ["integer", "null"], "minimum": 1, "maximum": 31_536_000},
    },
    "required": ["title"],
    "additionalProperties": False,
}


class TaskTriggerAction:
    """Creates tasks for triggers. The plugin connects the action to its services with `set_services`."""

    def __init__(self) -> None:
        self._services: tuple[TaskCreation, OwnerActions, Agents] | None = None

    def set_services(self, creation: TaskCreation, actions: OwnerActions, agents: Agents) -> None:
        """Connect the action to the services that it calls."""
        self._services = creation, actions, agents

    def definition(self) -> TriggerAction:
        """Return the definition of the action."""
        return TriggerAction(
            type="create_task",
            title="Create a task",
            schema=SCHEMA,
            example={"title": "Report on {{ payload.title }}", "agent_role": "writer"},
            permission="tasks.write",
            run=self.create_task,
            check=self.check_agent,
            are_live=are_unfinished,
            cancel=self.cancel_task,
        )

    def create_task(self, context: FireContext, fields: Json) -> Json:
        """Create a task whose source is the trigger."""
        creation, _, _ = self._require_services()
        given = {name: value for name, value in fields.items() if name != "deadline_seconds"}
        if (seconds := fields.get("deadline_seconds")) is not None:
            given["deadline"] = clock.now(seconds)
        made = creation.create(
            convert(NewTask, given, pointer_prefix="/action"),
            by=context.owner,
            source={"type": "trigger", "id": context.trigger_id},
            origin=Origin(
                cause_chain=context.cause_chain, tainted=context.tainted, taint_sources=context.taint_sources
            ),
        )
        return {"task_id": msgspec.json.decode(made.body)["id"]}

    def check_agent(self, caller: Principal, fields: Json) -> None:
        """Raise `Invalid` if the action names an agent that does not exist."""
        _, _, agents = self._require_services()
        find_named_agent(agents, fields.get("agent_id"), fields.get("agent_role"))

    def cancel_task(self, context: FireContext, result: Json) -> None:
        """Cancel the task that an earlier firing of the trigger created."""
        _, actions, _ = self._require_services()
        actions.cancel(result["task_id"], by=context.owner, reason=f"Replaced by trigger {context.trigger_name}.")

    def _require_services(self) -> tuple[TaskCreation, OwnerActions, Agents]:
        if self._services is None:
            raise Unavailable("The server is starting; try again.")
        return self._services


def are_unfinished(results: Sequence[Json]) -> list[bool]:
    """For each result of the action `create_task`, return whether the created task is unfinished."""
    ids = [result["task_id"] for result in results]
    found: Any = Task.select(Task.id).where(Task.id.in_(ids) & Task.status.not_in(TERMINAL)).tuples()
    live = {row[0] for row in found}
    return [each in live for each in ids]


def find_tainted(ids: Collection[str]) -> dict[str, bool]:
    """For each of these ids that belongs to a task, return whether the task is tainted."""
    found: Any = Task.select(Task.id, Task.extra).where(Task.id.in_(list(ids))).tuples()
    return {task_id: bool(extra.get("tainted")) for task_id, extra in found}


TAINT_CHECK = TaintCheck(type="task", field="task_id", find=find_tainted)
