"""The hook specification of the `tasks` plugin.

Task executors prepare the claims of tasks that do not run in the agent loop.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.tasks.api import TaskExecutor

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_task_executors() -> Iterable[TaskExecutor]:  # type: ignore[empty-body]
    """Contribute task executors.

    The first executor that handles a task prepares its claim. A task that no executor handles is run by the agent loop.
    """
