"""Audit entries that the request pipeline writes, each in its own unit of work.

Denied privileged operations are always recorded. All other requests are recorded only in verbose mode.
"""

from __future__ import annotations

import logging

from corral.asgi.endpoint import Endpoint
from corral.asgi.request import IncomingRequest
from corral.errors import Problem
from corral.kernel import Kernel
from corral.plugin import Audit, AuditEntry

log = logging.getLogger("corral.http")


class RequestAudit:
    """Writes the pipeline's audit entries.

    A failure to write an entry does not fail the request: the operation was either denied or is already complete.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._database = kernel.database
        self.log: Audit | None = kernel.container.get_optional(Audit)

    async def request_denied(self, request: IncomingRequest, endpoint: Endpoint, refusal: Problem) -> None:
        """Record that a caller was denied an operation that is reserved for admins or auditors."""
        await self._write(request, endpoint, "denied", refusal.code)

    async def request_served(self, request: IncomingRequest, endpoint: Endpoint, status: int, code: str | None) -> None:
        """Record a request that was answered, unless the route is a health endpoint."""
        if not endpoint.route.exempt_host:
            outcome = "success" if status < 400 else "denied" if status == 403 else "failed"
            await self._write(request, endpoint, outcome, code)

    async def _write(self, request: IncomingRequest, endpoint: Endpoint, outcome: str, code: str | None) -> None:
        audit = self.log
        if audit is None:
            return
        area = endpoint.route.needs[0].rpartition(".")[0] or endpoint.route.plugin
        row = AuditEntry(
            action=f"{area}.request.{'read' if endpoint.is_read else 'write'}",
            object_type="route",
            object_id=endpoint.label,
            object_name=request.path,
            outcome=outcome,  # type: ignore[arg-type]  # the callers pass "success", "denied" or "failed"
            code=code,
        )
        try:
            await self._database.work(lambda: audit.record(row), entry=request.entry(request.principal))
        except Problem:
            log.warning("request not audited", extra={"route": endpoint.label, "code": code})
