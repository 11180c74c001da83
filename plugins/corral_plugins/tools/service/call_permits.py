"""One-time permits that let workers run allowed tool calls, and the outcomes that workers report.

A permit is valid for 60 seconds.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.crypto import Sealer
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, Forbidden, NotFound
from corral.redact.redactor import Redactor
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.call_store import to_json, truncate_output
from corral_plugins.tools.service.held_call_outcomes import HeldResults
from corral_plugins.tools.service.metrics import ToolMetrics
from corral_plugins.tools.service.registry import RegisteredTool, ToolRegistry
from corral_plugins.tools.shapes import ReportedToolError, ToolCallReport, ToolCallView

PERMIT_SECONDS = 60
REPORT_GRACE_SECONDS = 30
PURPOSE = "tools.permit"


class ToolPermits:
    """The service that issues permits and accepts the reports of workers.

    A permit documents that a call was allowed. It does not stop a compromised worker from running tools without a
    permit.
    """

    tasks: Tasks | None

    def __init__(
        self,
        work: Work,
        sealer: Sealer,
        redactor: Redactor,
        registry: ToolRegistry,
        metrics: ToolMetrics,
        results: HeldResults,
    ) -> None:
        self._work, self._sealer, self._redactor = work, sealer, redactor
        self._registry, self._metrics, self._results = registry, metrics, results

    @staticmethod
    def permit_columns(tool: RegisteredTool) -> dict[str, Any]:
        """Return the columns of a new permit.

        They contain the time when the permit expires, and the time after which its call is considered abandoned.
        """
        return {
            "permit_until": clock.now(PERMIT_SECONDS),
            "alive_until": clock.now(PERMIT_SECONDS + tool.timeout_seconds + REPORT_GRACE_SECONDS),
        }

    @staticmethod
    def is_valid(row: ToolCallRow, run: Run) -> bool:
        """Return whether a permit belongs to the run's lease and has not expired."""
        return bool(row.lease_id == run.lease_id and (row.permit_until or "") > clock.now())

    def view_with_permit(self, row: ToolCallRow, tool: RegisteredTool) -> ToolCallView:
        """Build the response body for a call, including its permit. Only the call's worker may receive the permit."""
        shown = call_store.call_view(row)
        shown.timeout_seconds = tool.timeout_seconds
        shown.permit = base64.urlsafe_b64encode(self._sealer.mac(PURPOSE, _signed_data(row))).rstrip(b"=").decode()
        shown.permit_expires_at = row.permit_until or clock.now()
        return shown

    async def store_report(
        self,
        task_id: str,
        call_id: str,
        report: ToolCallReport,
        *,
        lease_id: str | None,
        by: Principal,
        entry: UnitContext,
    ) -> ToolCallView:
        """Store the outcome of a permitted call and return the call.

        Repeating the same report has no effect. Raise `Conflict` (`already_decided`) if a different outcome is already
        stored, and `Forbidden` if the permit is wrong.
        """
        result, error = await asyncio.to_thread(self._redact_report, report)
        return await self._work(
            lambda: self._store_report(task_id, call_id, report, result, error, lease_id=lease_id, by=by), entry=entry
        )

    def _redact_report(self, report: ToolCallReport) -> tuple[Any, dict[str, Any] | None]:
        error = report.error
        if error is None:
            return truncate_output(self._redactor.redact_json(to_json(report.result))), None
        if isinstance(error, str):
            error = ReportedToolError(message=error)
        return None, truncate_output(self._redactor.redact_json(msgspec.structs.asdict(error)))

    def _store_report(
        self,
        task_id: str,
        call_id: str,
        report: ToolCallReport,
        result: Any,
        error: dict[str, Any] | None,
        *,
        lease_id: str | None,
        by: Principal,
    ) -> ToolCallView:
        if self.tasks is None:
            raise NotFound("There is no task with this id.")
        run = self.tasks.lock_run(task_id, lease_id, by=by)
        row = call_store.find_call(task_id, call_id)
        if row is None:
            raise NotFound("This task has no tool call with this id.")
        if row.lease_id != run.lease_id or not self._is_permit(report.permit, row):
            raise Forbidden("The permit belongs to another call or lease.")
        if row.status != "permitted":
            if row.status in ("succeeded", "failed") and (row.result, row.error) == (result, error):
                return call_store.call_view(row)
            raise Conflict(
                f"The call already has a result: {row.status}.", code="already_decided", current_status=row.status
            )
        tool = self._registry.find_tool(row.tool, worker_id=run.worker_id)
        tainted = tool is None or tool.definition.untrusted_output
        if tainted and self.tasks.taint_run(task_id, run.lease_id, (row.tool,)):
            self._metrics.count_tainted_attempt()
        status = "succeeded" if error is None else "failed"
        duration, causes = report.duration_ms, run.cause_chain
        call_store.end_call(
            row, status, result=result, error=error, duration_ms=duration, tainted=tainted, causes=causes
        )
        self._metrics.observe_duration(tool, row.duration_ms or 0)
        self._results.deliver(row)
        return call_store.call_view(row)

    def _is_permit(self, permit: str, row: ToolCallRow) -> bool:
        try:
            mac = base64.urlsafe_b64decode(permit + "=" * (-len(permit) % 4))
        except ValueError:
            return False
        return self._sealer.verify(PURPOSE, _signed_data(row), mac)


def _signed_data(row: ToolCallRow) -> bytes:
    """Return the data that a permit's signature covers: call, lease, execution number and hash of the arguments."""
    return msgspec.json.encode([row.id, row.lease_id, row.executions, row.arguments_sha256])
