"""Removes a whole beginning of the log, up to a checkpoint: first the anchor moves, as one audited action, then the
rows before it go, a few at a time.
"""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.plugin import AuditEntry, Settings
from corral_plugins.audit.models import HEAD, AuditRow, Checkpoint, Head
from corral_plugins.audit.service import reading
from corral_plugins.audit.service.log import AuditLog
from corral_plugins.audit.settings import RETENTION_DAYS

DAY = 86_400
AT_ONCE = 500
ENTRY = Entry("job audit.retain")


class Retention:
    """Runs again at the next slot where it was cut short."""

    def __init__(self, work: Work, settings: Settings, log: AuditLog) -> None:
        self._work, self._settings, self._log = work, settings, log

    async def run(self) -> None:
        """Remove what is older than `audit.retention_days`; nothing while that is unset."""
        days = self._settings.get(RETENTION_DAYS)
        if days is not None:
            before = clock.now(-days * DAY)
            await self._work(lambda: self._move_anchor(before, days), entry=ENTRY)
        while await self._work(_remove_some, entry=ENTRY):
            continue

    def _move_anchor(self, before: str, days: int) -> None:
        """A checkpoint is made after the rows that it signs: one that is old enough has only older rows before it."""
        found: Checkpoint | None = (
            Checkpoint.select().where(Checkpoint.ts <= before).order_by(Checkpoint.seq.desc()).first()
        )
        anchor = reading.ends().anchor
        if found is None or found.seq <= anchor.seq:
            return
        moved = Head.update(anchor_seq=found.seq, anchor_hash=found.hash)
        if not moved.where((Head.id == HEAD) & (Head.anchor_seq == anchor.seq)).execute():
            return  # another process did
        details = {"removed": found.seq - anchor.seq, "hash": found.hash, "retention_days": days}
        self._log.record(
            AuditEntry(action=reading.RETAINED, object_type="audit_log", object_id=str(found.seq), details=details)
        )


def _remove_some() -> int:
    """Rows and checkpoints before the anchor; its own checkpoint stays, for `verify` begins there."""
    anchor = reading.ends().anchor.seq
    rows = AuditRow.select(AuditRow.seq).where(AuditRow.seq <= anchor).order_by(AuditRow.seq).limit(AT_ONCE)
    gone = AuditRow.delete().where(AuditRow.seq.in_(rows)).execute()
    signed = Checkpoint.select(Checkpoint.seq).where(Checkpoint.seq < anchor).order_by(Checkpoint.seq).limit(AT_ONCE)
    return int(gone + Checkpoint.delete().where(Checkpoint.seq.in_(signed)).execute())
