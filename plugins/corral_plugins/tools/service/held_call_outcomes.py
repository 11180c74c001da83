"""Passes the outcome of a held call to the `approvals` plugin and to the waiting task.

This happens in the transaction that ends the call.
"""

from __future__ import annotations

from collections.abc import Sequence

from corral_plugins.approvals.api import Approvals
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Json
from corral_plugins.tools.models import ToolCallRow


class HeldResults:
    """Delivers the outcomes of held calls. Every method runs in the caller's unit of work."""

    approvals: Approvals | None
    tasks: Tasks | None

    def deliver(self, row: ToolCallRow) -> None:
        """Record the outcome of a held call, and let its task continue.

        Do nothing for a call that needed no approval.
        """
        if row.approval_id is None or self.approvals is None:
            return
        self.approvals.record_execution(row.approval_id, status=row.status, tool_call_id=row.id, error=row.error)
        self.resume(row, [result_item(row)])

    def resume(self, row: ToolCallRow, results: Sequence[Json]) -> None:
        """Let a task continue with the given results, if the task is still waiting for the decision on its call."""
        if self.approvals is None or self.tasks is None or row.approval_id is None:
            return
        facts = self.approvals.find(row.approval_id)
        if facts is not None:
            given = {"decision": facts.decision, "tool_results": list(results)}
            self.tasks.resume(row.task_id, kind="approval", id=facts.id, given=given)


def result_item(row: ToolCallRow) -> Json:
    """Return the outcome of a call in the form used in the task's next claim."""
    return {"call_id": row.call_id, "status": row.status, "result": row.result, "error": row.error}
