"""The hook specification of the `workflows` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.workflows.api import StepType

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_workflow_steps() -> Iterable[StepType]:  # type: ignore[empty-body]
    """Contribute step types for workflows.

    A step type whose name is already in use is ignored.
    """
