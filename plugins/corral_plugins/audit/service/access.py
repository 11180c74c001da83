"""Who looked at the log, and who took it away."""

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
    """Notes what was read. An auditor can read a log that cannot be written: then the failure is logged and counted."""

    def __init__(self, work: Work, audit: AuditLog) -> None:
        self._work, self._audit = work, audit

    async def note(self, verb: str, by: Entry, **details: Any) -> None:
        """A row `audit.log.<verb>`."""
        told = {name: value for name, value in details.items() if value not in (None, {})}
        entry = AuditEntry(action=f"audit.log.{verb}", object_type="audit_log", object_id=None, details=told)
        try:
            await self._work(lambda: self._audit.record(entry), entry=by)
        except Unavailable:
            log.warning("a look at the audit log is not in it", extra={"action": entry.action})
