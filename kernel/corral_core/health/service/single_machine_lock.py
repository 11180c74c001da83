"""The single-machine lock: a database file serves the processes of one machine, which holds a lease on it."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from pathlib import Path

from corral.database.engine import Work
from corral.database.leases import acquire, holder_of, release
from corral.database.unit import Entry
from corral.errors import Refused

log = logging.getLogger("corral.health")

LEASE, LEASE_SECONDS, RENEW_SECONDS = "health.single_machine", 30.0, 10.0
ENTRY = Entry("health.single_machine")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SingleMachineLock:
    """A lease held by a machine, not by a process. `holder` is the host name and the boot id, by which containers on
    one machine recognize each other.
    """

    def __init__(self, work: Work, holder: str | None = None) -> None:
        self._work, self._holder = work, holder or _this_machine()

    async def acquire(self) -> None:
        """Take the lease; raises `Refused` while another machine holds it."""
        other = await self._work(self._take, entry=ENTRY)
        if other is not None:
            name = other.partition(" ")[0]
            raise Refused(f"another machine, {name}, serves this database file; stop it, or use a database server")

    async def keep(self) -> None:
        """Renew the lease until cancelled. Supervised by the kernel."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            other = await self._work(self._take, entry=ENTRY)
            if other is not None:
                log.critical("another machine serves this database file too", extra={"machine": other})

    def _take(self) -> str | None:
        """Take the lease; returns another holder, or None. The same host name or boot id is the same machine."""
        before = holder_of(LEASE)
        if before is not None and before != self._holder and {*before.split()} & {*self._holder.split()}:
            release(LEASE, before)
        return None if acquire(LEASE, self._holder, LEASE_SECONDS) else holder_of(LEASE)


def _this_machine() -> str:
    try:
        identity = BOOT_ID.read_text("ascii").strip()
    except OSError:
        identity = f"{uuid.getnode():x}"
    return f"{socket.gethostname()[:40]} {identity[:36]}"
