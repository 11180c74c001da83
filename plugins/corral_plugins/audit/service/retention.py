"""Removes the oldest audit rows up to a checkpoint.

The anchor marks the newest removed row. Retention first moves the anchor, which is recorded in the audit log, and then
deletes the rows up to the anchor in batches.
"""

from __future__ import annotations

from corral import clock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.plugin import AuditEntry, Settings
from corral_plugins.audit.models import HEAD, AuditRow, ChainHead, CheckpointRow
from corral_plugins.audit.service import queries
from corral_plugins.audit.service.log import AuditLog
from corral_plugins.audit.settings import RETENTION_DAYS

DAY = 86_400
BATCH_SIZE = 500
ENTRY = UnitContext("job audit.retain")


class AuditRetention:
    """Removes expired rows. If a run is interrupted, the next scheduled run continues the removal."""

    def __init__(self, work: Work, settings: Settings, log: AuditLog) -> None:
        self._work, self._settings, self._log = work, settings, log

    async def remove_expired_rows(self) -> None:
        """Remove rows older than `audit.retention_days`. If this setting has no value, no rows expire."""
        days = self._settings.get(RETENTION_DAYS)
        if days is not None:
            before = clock.now(-days * DAY)
            await self._work(lambda: self._move_anchor(before, days), entry=ENTRY)
        while await self._work(_remove_batch, entry=ENTRY):
            continue

    def _move_anchor(self, before: str, days: int) -> None:
        """Move the anchor to the newest checkpoint created at or before the time `before`.

        All rows up to this checkpoint are older than the checkpoint, so they have expired too.
        """
        found: CheckpointRow | None = (
            CheckpointRow.select().where(CheckpointRow.ts <= before).order_by(CheckpointRow.seq.desc()).first()
        )
        anchor = queries.chain_ends().anchor
        if found is None or found.seq <= anchor.seq:
            return
        moved = ChainHead.update(anchor_seq=found.seq, anchor_hash=found.hash)
        if not moved.where((ChainHead.id == HEAD) & (ChainHead.anchor_seq == anchor.seq)).execute():
            return  # another process moved the anchor
        details = {"removed": found.seq - anchor.seq, "hash": found.hash, "retention_days": days}
        self._log.record(
            AuditEntry(action=queries.RETAINED, object_type="audit_log", object_id=str(found.seq), details=details)
        )


def _remove_batch() -> int:
    """Delete one batch of rows and checkpoints. Return the total number of deleted rows and checkpoints.

    The checkpoint at the anchor remains, because verification starts there.
    """
    anchor = queries.chain_ends().anchor.seq
    rows = AuditRow.select(AuditRow.seq).where(AuditRow.seq <= anchor).order_by(AuditRow.seq).limit(BATCH_SIZE)
    gone = AuditRow.delete().where(AuditRow.seq.in_(rows)).execute()
    signed = (
        CheckpointRow.select(CheckpointRow.seq)
        .where(CheckpointRow.seq < anchor)
        .order_by(CheckpointRow.seq)
        .limit(BATCH_SIZE)
    )
    return int(gone + CheckpointRow.delete().where(CheckpointRow.seq.in_(signed)).execute())
