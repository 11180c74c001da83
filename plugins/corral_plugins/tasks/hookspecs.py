"""The hook of tasks: executors, which prepare claims of tasks that do not run in the agent loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import pluggy

hookspec = pluggy.HookspecMarker("corral")


class TaskExecutor(Protocol):
    """Prepares claims of the tasks that it handles. Called in the unit of the claim: rows only, no I/O."""

    def handles(self, task: dict[str, Any]) -> bool:
        """Whether it handles a task: its `id`, `source` (`{type, id}`), `workflow_run_id` and `step_run_id`."""
        ...

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """The configuration that replaces the agent loop; it becomes `agent.config.executor` of the claim."""
        ...


@hookspec
def corral_task_executors() -> Iterable[TaskExecutor]:  # type: ignore[empty-body]
    """Contribute executors. The first that handles a task prepares its claim; without one it runs in the agent loop."""
