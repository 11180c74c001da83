"""The hook specification of the `tasks` plugin.

Task executors prepare the claims of tasks that do not run in the agent loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import pluggy

hookspec = pluggy.HookspecMarker("corral")


class TaskExecutor(Protocol):
    """Decides, for the tasks that it handles, what the worker runs instead of the agent loop.

    Both methods run in the claim's unit of work. They may read and write rows, but must not do any other I/O.
    """

    def handles(self, task: dict[str, Any]) -> bool:
        """Return whether this executor handles the task.

        `task` contains `id`, `source` (`{type, id}`), `workflow_run_id` and `step_run_id`.
        """
        ...

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration by which the worker runs the task instead of running the agent loop.

        The claim contains the configuration as `agent.config.executor`.
        """
        ...


@hookspec
def corral_task_executors() -> Iterable[TaskExecutor]:  # type: ignore[empty-body]
    """Contribute task executors.

    The first executor that handles a task prepares its claim. A task that no executor handles runs in the agent loop.
    """
