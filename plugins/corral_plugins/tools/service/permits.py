"""Permits for tools that run on workers: good for 60 s and one use; and what workers tell of such calls."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.crypto import Keyring
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Forbidden, NotFound
from corral.redact.redactor import Redactor
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.service import ledger
from corral_plugins.tools.service.figures import Figures
from corral_plugins.tools.service.output import fitted, plain
from corral_plugins.tools.service.registry import Known, Registry
from corral_plugins.tools.shapes import CallView, Reported, ReportedError

PERMIT_SECONDS = 60
GRACE_SECONDS = 30
PURPOSE = "tools.permit"


class Permits:
    """The permit is the record of the decision; what a worker does without asking is outside of it."""

    tasks: Tasks | None

    def __init__(self, work: Work, keyring: Keyring, redactor: Redactor, registry: Registry, figures: Figures) -> None:
        self._work, self._keyring, self._redactor = work, keyring, redactor
        self._registry, self._figures = registry, figures

    @staticmethod
    def terms(known: Known) -> dict[str, Any]:
        """The columns of a new permit: until when it may be used, and until when its result may come."""
        return {
            "permit_until": clock.now(PERMIT_SECONDS),
            "alive_until": clock.now(PERMIT_SECONDS + known.timeout_seconds + GRACE_SECONDS),
        }

    @staticmethod
    def is_good(row: ToolCall, run: Run) -> bool:
        """Whether this lease may still use the permit; it alone knows whether it has."""
        return bool(row.lease_id == run.lease_id and (row.permit_until or "") > clock.now())

    def shown(self, row: ToolCall) -> CallView:
        """The call with its permit, for the worker alone."""
        shown = ledger.view(row)
        shown.permit = base64.urlsafe_b64encode(self._keyring.mac(PURPOSE, _data(row))).rstrip(b"=").decode()
        shown.permit_expires_at = row.permit_until or clock.now()
        return shown

    async def report(
        self, task_id: str, call_id: str, told: Reported, *, lease_id: str | None, by: Principal, entry: Entry
    ) -> CallView:
        """The result of a call that was permitted. The same again is the same answer; another: `already_decided`."""
        result, error = await asyncio.to_thread(self._kept, told)
        return await self._work(
            lambda: self._report(task_id, call_id, told, result, error, lease_id=lease_id, by=by), entry=entry
        )

    def _kept(self, told: Reported) -> tuple[Any, dict[str, Any] | None]:
        error = told.error
        if error is None:
            return fitted(self._redactor.redact_json(plain(told.result))), None
        if isinstance(error, str):
            error = ReportedError(message=error)
        return None, fitted(self._redactor.redact_json(msgspec.structs.asdict(error)))

    def _report(
        self,
        task_id: str,
        call_id: str,
        told: Reported,
        result: Any,
        error: dict[str, Any] | None,
        *,
        lease_id: str | None,
        by: Principal,
    ) -> CallView:
        if self.tasks is None:
            raise NotFound()
        run = self.tasks.run(task_id, lease_id, by=by)
        row = ledger.find(task_id, call_id)
        if row is None:
            raise NotFound("There is no call with this id.")
        if row.lease_id != run.lease_id or not self._is_permit(told.permit, row):
            raise Forbidden("This is not the permit of this call under this lease.")
        if row.status != "permitted":
            if row.status in ("succeeded", "failed") and (row.result, row.error) == (result, error):
                return ledger.view(row)
            raise Conflict(f"The call has {row.status} already.", code="already_decided", current_status=row.status)
        known = self._registry.find(row.tool, worker_id=run.worker_id)
        tainted = known is None or known.tool.untrusted_output
        if tainted and self.tasks.taint(task_id, run.lease_id, (row.tool,)):
            self._figures.tainted()
        status = "succeeded" if error is None else "failed"
        ledger.end(row, status, result=result, error=error, duration_ms=told.duration_ms, tainted=tainted)
        self._figures.ended(known, row.duration_ms or 0)
        return ledger.view(row)

    def _is_permit(self, permit: str, row: ToolCall) -> bool:
        try:
            mac = base64.urlsafe_b64decode(permit + "=" * (-len(permit) % 4))
        except ValueError:
            return False
        return self._keyring.verify(PURPOSE, _data(row), mac)


def _data(row: ToolCall) -> bytes:
    """What a permit is bound to: the call with its arguments, the lease, and which execution it is."""
    return msgspec.json.encode([row.id, row.lease_id, row.executions, row.arguments_sha256])
