"""The single-machine lock: a lease that allows the processes of only one machine to use a database file."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from pathlib import Path

from corral.database.engine import Work
from corral.database.leases import acquire_lease, lease_holder, release_lease
from corral.database.unit import UnitContext
from corral.errors import StartupError, Unavailable

log = logging.getLogger("corral.health")

LEASE, LEASE_SECONDS, RENEW_SECONDS = "health.single_machine", 30.0, 10.0
ENTRY = UnitContext("health.single_machine")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SingleMachineLock:
    """A lease shared by all processes of one machine.

    `holder` consists of the host name and the boot id. Containers on one machine have the same boot id.
    """

    def __init__(self, work: Work, holder: str | None = None) -> None:
        self._work, self._holder = work, holder or _this_machine()

    async def acquire(self) -> None:
        """Acquire the lease. Raise `StartupError` if another machine holds it.

        If the lease cannot be written because the disk is full, and no other machine holds it, this method returns. The
        next renewal tries again.
        """
        try:
            other = await self._work(self._acquire_or_renew, entry=ENTRY)
        except Unavailable as error:
            if error.code != "storage_full":
                raise
            other = await self._work(self._other_holder, read=True)
        if other is not None:
            name = other.partition(" ")[0]
            raise StartupError(
                f"a server on the machine {name} already uses this database file; stop that server, or use a "
                "database server"
            )

    async def renew_regularly(self) -> None:
        """Renew the lease until cancelled. The kernel supervises this task."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            other = await self._work(self._acquire_or_renew, entry=ENTRY)
            if other is not None:
                log.critical("another machine also serves this database file", extra={"machine": other})

    def _acquire_or_renew(self) -> str | None:
        """Acquire or renew the lease. Return None on success, otherwise the current holder.

        Holders with the same host name or the same boot id count as the same machine.
        """
        before = lease_holder(LEASE)
        if before is not None and before != self._holder and self._is_this_machine(before):
            release_lease(LEASE, before)
        return None if acquire_lease(LEASE, self._holder, LEASE_SECONDS) else lease_holder(LEASE)

    def _other_holder(self) -> str | None:
        holder = lease_holder(LEASE)
        return None if holder is None or self._is_this_machine(holder) else holder

    def _is_this_machine(self, holder: str) -> bool:
        return bool({*holder.split()} & {*self._holder.split()})


def _this_machine() -> str:
    try:
        identity = BOOT_ID.read_text("ascii").strip()
    except OSError:
        identity = f"{uuid.getnode():x}"
    return f"{socket.gethostname()[:40]} {identity[:36]}"
