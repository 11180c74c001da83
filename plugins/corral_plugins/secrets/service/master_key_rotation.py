"""Counts the rows that are encrypted under each master key, and rewraps every encrypted row under the active key.

Rows are rewrapped in batches, each in its own unit of work. At any time, each row is encrypted under either the old or
the new key, and both keys are loaded. An interruption therefore loses nothing, and the next run continues with the
remaining rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

from corral.crypto import InvalidSealedValue, KeyRotation
from corral.database.engine import Work
from corral.database.leases import acquire_lease, lease_holder, release_lease
from corral.database.sealed_columns import SealedColumn, SealedColumns
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Conflict, Unavailable
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Audit, AuditEntry
from corral_plugins.secrets.service.sealed_column_values import SealedValue, replace_value, values_after
from corral_plugins.secrets.service.values import decode_hex
from corral_plugins.secrets.shapes import KeyCount, KeyStatus

JOB, LEASE = "secrets.rewrap", "secrets.rewrap"
BATCH_SIZE = 200
QUEUED_SECONDS, LEASE_SECONDS, RUN_SECONDS = 60, 5, 20.0
CACHE_SECONDS = 30.0
ENTRY = UnitContext(label="secrets.rewrap", actor=SYSTEM)
Read = Callable[[Callable[[], list[SealedValue]]], list[SealedValue]]


class MasterKeyRotation:
    """Manages the rotation of master keys.

    `rewrap_rows` opens its own units of work. All other methods run in the caller's unit of work.
    """

    audit: Audit | None

    def __init__(self, rotation: KeyRotation, columns: SealedColumns, work: Work) -> None:
        self._rotation, self._columns, self._work = rotation, columns, work
        self._counted: tuple[float, float] | None = None

    def key_status(self) -> KeyStatus:
        """Return the id of each master key and the number of rows that are encrypted under it."""
        counts = self._columns.counts_by_key()
        labels = self._rotation.key_labels
        listed = [*labels, *sorted(counts.keys() - labels.keys())]
        active = next(iter(labels), None)
        return KeyStatus(
            sealed=self._rotation.sealed,
            active_key=active,
            remaining=_count_rows_to_rewrap(counts, active),
            rotating=lease_holder(LEASE) is not None,
            keys=[KeyCount(key_id=id, label=labels.get(id), rows=counts.get(id, 0)) for id in listed],
        )

    def begin_rotation(self) -> tuple[int, str]:
        """Acquire the lease for a rotation. Return the number of rows to rewrap, and the holder of the lease.

        Raise `Conflict` (`invalid_state`) if a rotation is already running or no row needs to be rewrapped, and
        `Unavailable` (`vault_sealed`) if the vault is sealed.
        """
        active = self._rotation.active_id
        remaining = _count_rows_to_rewrap(self._columns.counts_by_key(), active)
        if not remaining:
            detail = (
                "Every row is already encrypted under the active key. To rotate the key, insert a new key at the "
                "beginning of CORRAL_MASTER_KEY and restart the server."
            )
            raise Conflict(detail, current_status="idle")
        holder = new_id()
        if not acquire_lease(LEASE, holder, QUEUED_SECONDS):
            raise Conflict(
                "A master key rotation is already running; wait until it finishes.", current_status="rotating"
            )
        if self.audit is not None:
            entry = AuditEntry(
                action="secrets.master_key.rotate",
                object_type="master_key",
                object_id=active,
                details={"remaining": remaining},
            )
            self.audit.record(entry)
        return remaining, holder

    def enqueue_rotation(self) -> int:
        """Enqueue the rotation as a background job. Return the number of rows to rewrap."""
        remaining, holder = self.begin_rotation()
        enqueue(JOB, holder=holder)
        return remaining

    async def rewrap_rows(self, holder: str, *, seconds: float = RUN_SECONDS) -> bool:
        """Rewrap rows for at most `seconds` seconds.

        Return False if rows remain because the time ran out, and True if no rows remain or the lease was lost.
        """
        until = time.monotonic() + seconds
        for column in self._columns.columns:
            after: Any = None
            while values := await self._next_batch(column, after):
                rewrapped = await asyncio.to_thread(self._rewrap_values, values)
                if not await self._work(functools.partial(self._write_values, column, rewrapped, holder), entry=ENTRY):
                    return True
                if time.monotonic() >= until:
                    return False
                after = values[-1].row
        await self._work(lambda: release_lease(LEASE, holder), entry=ENTRY)
        return True

    async def _next_batch(self, column: SealedColumn, after: Any) -> list[SealedValue]:
        """Return the next batch of a column's values that are not yet encrypted under the active key."""
        read = functools.partial(values_after, column, after, BATCH_SIZE, except_key=self._rotation.active_id)
        return await self._work(read, entry=ENTRY, read=True)

    def _rewrap_values(self, values: list[SealedValue]) -> list[tuple[SealedValue, str]]:
        """Rewrap the values that can be decrypted. Values that are damaged or whose key is not loaded are skipped."""
        found = []
        for item in values:
            with contextlib.suppress(InvalidSealedValue, Unavailable):
                found.append((item, self._rotation.rewrap(decode_hex(item.value)).hex()))
        return found

    @staticmethod
    def _write_values(column: SealedColumn, rewrapped: list[tuple[SealedValue, str]], holder: str) -> bool:
        """Store the rewrapped values if `holder` still holds the lease. Return whether `holder` still held it.

        Values that have changed in the meantime are not overwritten.
        """
        if not acquire_lease(LEASE, holder, LEASE_SECONDS):
            return False
        for item, text in rewrapped:
            replace_value(column, item, text)
        return True

    def remaining_rows(self) -> float:
        """Return the number of rows that are not encrypted under the active key.

        The number is cached for 30 seconds.
        """
        now = time.monotonic()
        if self._counted is None or now - self._counted[0] > CACHE_SECONDS:
            active = next(iter(self._rotation.key_labels), None)
            self._counted = (now, float(_count_rows_to_rewrap(self._columns.counts_by_key(), active)))
        return self._counted[1]

    def count_unreadable_values(self, read: Read) -> dict[str, int]:
        """Return, for each encrypted column, the number of values that none of the loaded keys can decrypt.

        `read` is a function that runs a query in a unit of work.
        """
        found: dict[str, int] = {}
        for column in self._columns.columns:
            after: Any = None
            while values := read(functools.partial(values_after, column, after, BATCH_SIZE)):
                wrong = sum(not self._can_unwrap(item.value) for item in values)
                found[column.name] = found.get(column.name, 0) + wrong
                after = values[-1].row
        return found

    def _can_unwrap(self, text: str) -> bool:
        try:
            return self._rotation.can_unwrap(decode_hex(text))
        except InvalidSealedValue:
            return False


def _count_rows_to_rewrap(counts: dict[str, int], active: str | None) -> int:
    return sum(count for key, count in counts.items() if key != active)
