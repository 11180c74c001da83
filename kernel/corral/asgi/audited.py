"""What the request path itself tells the audit log, in units of its own: denials, and with `verbose` every request."""

from __future__ import annotations

import logging

from corral.asgi.call import Call
from corral.asgi.endpoint import Endpoint
from corral.auth.principal import Principal
from corral.database.engine import Database
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import Problem
from corral.plugin import Audit, AuditEntry

log = logging.getLogger("corral.http")


class Audited:
    """Nothing is refused because such a row cannot be written: nothing happened, or it is done already."""

    def __init__(self, database: Database, audit: Audit | None) -> None:
        self._database, self._audit = database, audit

    @property
    def verbose(self) -> bool:
        """Whether `seen` is to be told of every request."""
        return self._audit is not None and self._audit.verbose

    async def denied(self, call: Call, endpoint: Endpoint, caller: Principal, refusal: Problem) -> None:
        """A caller was refused what only admins or auditors may do."""
        await self._write(call, endpoint, caller, "denied", refusal.code)

    async def seen(self, call: Call, endpoint: Endpoint, status: int, code: str | None) -> None:
        """A request was answered; those of monitors are left out."""
        if not endpoint.route.exempt_host:
            outcome = "success" if status < 400 else "denied" if status == 403 else "failed"
            await self._write(call, endpoint, call.caller, outcome, code)

    async def _write(
        self, call: Call, endpoint: Endpoint, caller: Principal | None, outcome: str, code: str | None
    ) -> None:
        audit = self._audit
        if audit is None:
            return
        area = endpoint.route.needs[0].rpartition(".")[0] or endpoint.route.plugin
        told = AuditEntry(
            action=f"{area}.request.{'read' if endpoint.is_read else 'write'}",
            object_type="route",
            object_id=endpoint.label,
            object_name=call.path,
            outcome=outcome,  # type: ignore[arg-type]  # one of the three, see the callers
            code=code,
        )
        actor = ANONYMOUS if caller is None else caller.actor
        entry = Entry(endpoint.label, actor, (), call.request_id, call.client_ip, call.header(b"user-agent"))
        try:
            await self._database.work(lambda: audit.record(told), entry=entry)
        except Problem:
            log.warning("a request is not in the audit log", extra={"route": endpoint.label, "code": code})
