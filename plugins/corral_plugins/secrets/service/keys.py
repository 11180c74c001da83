"""The master keys: which rows need which, and giving every row of the product the active one.

Rows are rewrapped in batches, each in a unit of its own; a row is under an old key or under the new one and readable
under both, so a kill at any point loses nothing, and a second run goes on with what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

from corral.crypto import Keyring, SealedWrong
from corral.database.engine import Work
from corral.database.leases import acquire, holder_of, release
from corral.database.sealed import SealedColumn, SealedColumns, SealedValue
from corral.database.unit import SYSTEM, Entry
from corral.errors import Conflict, Unavailable
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Audit, AuditEntry
from corral_plugins.secrets.service.values import unhex
from corral_plugins.secrets.shapes import KeyCount, KeyStatus

JOB, LEASE = "secrets.rewrap", "secrets.rewrap"
AT_ONCE = 200
QUEUED_SECONDS, LEASE_SECONDS, RUN_SECONDS = 60, 5, 20.0
KEEP_SECONDS = 30.0
ENTRY = Entry(label="secrets.rewrap", actor=SYSTEM)
Read = Callable[[Callable[[], list[SealedValue]]], list[SealedValue]]


class MasterKeys:
    """`run` opens its own units, everything else joins the caller's."""

    audit: Audit | None

    def __init__(self, keyring: Keyring, columns: SealedColumns, work: Work) -> None:
        self._keyring, self._columns, self._work = keyring, columns, work
        self._counted: tuple[float, float] | None = None

    def status(self) -> KeyStatus:
        """Which keys there are, and how many rows need each."""
        counts = self._columns.counts()
        keys = {key.id: key for key in self._keyring.keys}
        listed = [*keys, *sorted(counts.keys() - keys.keys())]
        active = self._keyring.keys[0].id if keys else None
        return KeyStatus(
            sealed=self._keyring.sealed,
            active_key=active,
            remaining=_remaining(counts, active),
            rotating=holder_of(LEASE) is not None,
            keys=[
                KeyCount(key_id=id, label=keys[id].label if id in keys else None, rows=counts.get(id, 0))
                for id in listed
            ],
        )

    def begin(self) -> tuple[int, str]:
        """Take the work upon oneself: the number of rows and the holder to `run` with.

        `invalid_state`: one runs, or every row is under the active key. `vault_sealed`.
        """
        active = self._keyring.active.id
        remaining = _remaining(self._columns.counts(), active)
        if not remaining:
            told = "Every row is under the active key. Put a new one first in CORRAL_MASTER_KEY and restart."
            raise Conflict(told, current_status="idle")
        holder = new_id()
        if not acquire(LEASE, holder, QUEUED_SECONDS):
            raise Conflict("The rows are being rewrapped already.", current_status="rotating")
        if self.audit is not None:
            entry = AuditEntry(
                action="secrets.master_key.rotate",
                object_type="master_key",
                object_id=active,
                details={"remaining": remaining},
            )
            self.audit.record(entry)
        return remaining, holder

    def start(self) -> int:
        """Have it done by a job: how many rows."""
        remaining, holder = self.begin()
        enqueue(JOB, holder=holder)
        return remaining

    async def run(self, holder: str, *, seconds: float = RUN_SECONDS) -> bool:
        """Rewrap for so long; whether that was all. Ends at once when another has taken the work upon itself."""
        until = time.monotonic() + seconds
        for column in self._columns.columns:
            after: Any = None
            while values := await self._next(column, after):
                renewed = await asyncio.to_thread(self._renewed, values)
                if not await self._work(functools.partial(self._write, column, renewed, holder), entry=ENTRY):
                    return True
                if time.monotonic() >= until:
                    return False
                after = values[-1].row
        await self._work(lambda: release(LEASE, holder), entry=ENTRY)
        return True

    async def _next(self, column: SealedColumn, after: Any) -> list[SealedValue]:
        """The next values of a column that are not under the active key."""
        read = functools.partial(column.after, after, AT_ONCE, but=self._keyring.active.id)
        return await self._work(read, entry=ENTRY, read=True)

    def _renewed(self, values: list[SealedValue]) -> list[tuple[SealedValue, str]]:
        """Those that open, with their new form. What needs a key that is not here, or was changed, stays as it is."""
        found = []
        for item in values:
            with contextlib.suppress(SealedWrong, Unavailable):
                found.append((item, self._keyring.rewrap(unhex(item.value)).hex()))
        return found

    @staticmethod
    def _write(column: SealedColumn, renewed: list[tuple[SealedValue, str]], holder: str) -> bool:
        """Store them, unless another has taken the work upon itself; what was changed meanwhile stays."""
        if not acquire(LEASE, holder, LEASE_SECONDS):
            return False
        for item, text in renewed:
            column.replace(item, text)
        return True

    def remaining(self) -> float:
        """Rows that are not under the active key, counted twice a minute at most."""
        now = time.monotonic()
        if self._counted is None or now - self._counted[0] > KEEP_SECONDS:
            active = self._keyring.keys[0].id if self._keyring.keys else None
            self._counted = (now, float(_remaining(self._columns.counts(), active)))
        return self._counted[1]

    def unreadable(self, read: Read) -> dict[str, int]:
        """Of each column, the values whose keys are not here or do not open them. `read` runs in a unit."""
        found: dict[str, int] = {}
        for column in self._columns.columns:
            after: Any = None
            while values := read(functools.partial(column.after, after, AT_ONCE)):
                wrong = sum(not self._unwraps(item.value) for item in values)
                found[column.name] = found.get(column.name, 0) + wrong
                after = values[-1].row
        return found

    def _unwraps(self, text: str) -> bool:
        try:
            return self._keyring.unwraps(unhex(text))
        except SealedWrong:
            return False


def _remaining(counts: dict[str, int], active: str | None) -> int:
    return sum(count for key, count in counts.items() if key != active)
