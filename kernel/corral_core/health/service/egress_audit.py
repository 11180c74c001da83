"""Audit entries for connections that the egress guard refused."""

from __future__ import annotations

import asyncio
from collections import deque

from corral.database.engine import Work
from corral.database.unit import Entry
from corral.egress.client import Egress
from corral.errors import Unavailable
from corral.plugin import Audit, AuditEntry

MOST_WAITING = 1000
AGAIN_SECONDS = 5.0


class EgressAudit:
    """Records refused connections in the audit log.

    Connections are refused outside a unit of work, so refusals are queued and written in batches.
    """

    audit: Audit | None = None

    def __init__(self, egress: Egress, work: Work) -> None:
        self._work = work
        self._waiting: deque[AuditEntry] = deque(maxlen=MOST_WAITING)
        self._bell = asyncio.Event()
        egress.on_refusal = self._queue_entry

    async def write_entries(self) -> None:
        """Write queued refusals until cancelled, and retry failed writes. The kernel supervises this task."""
        while True:
            await self._bell.wait()
            self._bell.clear()
            some = [*self._waiting]
            self._waiting.clear()
            try:
                await self._work(lambda some=some: self._write(some), entry=Entry("refused connections"))  # type: ignore[misc]  # `some` is bound now
            except Unavailable:
                self._waiting.extendleft(reversed(some))
                await asyncio.sleep(AGAIN_SECONDS)
                self._bell.set()

    def _queue_entry(self, sink: str, host: str) -> None:
        entry = AuditEntry(
            action="egress.connection.open",
            object_type="host",
            object_id=host[:200],
            object_name=host,
            outcome="denied",
            code="url_blocked",
            details={"sink": sink},
        )
        self._waiting.append(entry)
        self._bell.set()

    def _write(self, entries: list[AuditEntry]) -> None:
        if self.audit is not None:
            for entry in entries:
                self.audit.record(entry)
