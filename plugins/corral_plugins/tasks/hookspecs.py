"""The hook that tasks payloads: who prepares the claim of a task that is not for the agent loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import pluggy

hookspec = pluggy.HookspecMarker("corral")


class TaskExecutor(Protocol):
    """Prepares claims of the tasks that it handles. Called in the unit of the claim: rows only, no I/O."""

    def handles(self, task: dict[str, Any]) -> bool:
        """Whether a task is its own; `task` has `id`, `source` (`{type, id}`), `workflow_run_id` and `step_run_id`."""
        ...

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """What the worker needs instead of the agent loop; it becomes `agent.config.executor` of the claim."""
        ...


@hookspec
def corral_task_executors() -> Iterable[TaskExecutor]:  # type: ignore[empty-body]
    """Who prepares a claim of a task: the one that handles it, else the agent loop."""
