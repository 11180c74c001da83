"""Records accesses to the audit log in the audit log."""

from __future__ import annotations

import logging
from typing import Any

from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Unavailable
from corral.plugin import AuditEntry
from corral_plugins.audit.service.log import AuditLog

log = logging.getLogger("corral.audit")


class Access:
    """Records accesses to the audit log.

    If a row cannot be written, the failure is logged and counted, so that auditors can still read the log.
    """

    def __init__(self, work: Work, audit: AuditLog) -> None:
        self._work, self._audit = work, audit

    async def record(self, verb: str, by: Entry, **details: Any) -> None:
        """Append a row with the action `audit.log.<verb>`."""
        given = {name: value for name, value in details.items() if value not in (None, {})}
        entry = AuditEntry(action=f"audit.log.{verb}", object_type="audit_log", object_id=None, details=given)
        try:
            await self._work(lambda: self._audit.record(entry), entry=by)
        except Unavailable:
            log.warning("cannot record an access to the audit log", extra={"action": entry.action})
