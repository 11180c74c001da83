"""Writes each request to the access log, and records requests in the audit log."""

from __future__ import annotations

import functools
import logging

from corral.asgi.endpoint import Endpoint
from corral.asgi.request import IncomingRequest
from corral.errors import Problem
from corral.kernel import Kernel
from corral.plugin import Audit

log, access_log = logging.getLogger("corral.http"), logging.getLogger("corral.access")

MIN_STATUS = {"off": 1000, "errors": 500, "all": 0}
"""The lowest response status that is logged, for each value of the setting `http.access_log`."""


def log_request(request: IncomingRequest, status: int, seconds: float) -> None:
    """Write a line about the request, which took `seconds` seconds, to the access log.

    Query strings are never logged.
    """
    route = request.endpoint.route if request.endpoint is not None else None
    fields = {
        "request_id": request.request_id,
        "method": request.method,
        "route": route.path if route else "unmatched",
        "plugin": route.plugin if route else "",
        "status": status,
        "duration_ms": round(seconds * 1000),
        "client_ip": request.client_ip,
    }
    access_log.info("request", extra=fields)


class RequestAudit:
    """Writes audit entries about requests, each in its own unit of work.

    Denied privileged operations are always recorded. All other requests are recorded only if the audit log is in
    verbose mode.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._database = kernel.database
        self.log: Audit | None = kernel.container.get_optional(Audit)

    async def record(self, request: IncomingRequest, endpoint: Endpoint, status: int, code: str | None) -> None:
        """Record a request that was answered with the given status.

        If the entry cannot be written, the request does not fail, because the operation was either denied or has
        already been completed.
        """
        audit = self.log
        if audit is None:
            return
        write = functools.partial(audit.record_request, endpoint.route, request.path, status, code)
        try:
            await self._database.work(write, entry=request.unit_context(request.principal))
        except Problem:
            log.warning("request not audited", extra={"route": endpoint.label, "code": code})
