"""The kernel's health checks. The details of their results contain no addresses, paths, users or secrets."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping

import peewee

from corral import clock
from corral.database.dialect import execute
from corral.database.engine import Database
from corral.database.leases import acquire_lease
from corral.errors import Problem
from corral.ids import new_id
from corral.jobs.job import ScheduleRow
from corral.plugin import Contributions, InstallationConfig
from corral.plugins.registry import PluginRegistry
from corral.storage.blobs import BlobStore
from corral_core.accounts.api import Mail

CheckResult = tuple[str, str]

PROBE = "health.probe"  # the lease that proves that the database accepts writes
SLOW_WRITE, SLOW_PROBE = 0.25, 1.0
POOL_FULL = 0.8
OVERDUE = 30.0
SKEW, WRONG_CLOCK = 1.0, 30.0
LITTLE, NOTHING_LEFT = 0.10, 0.02


class KernelChecks:
    """The kernel's health checks.

    Each check returns a status and a sentence that explains it. A check that raises an exception counts as `down`.
    """

    mail: Mail | None = None

    def __init__(
        self,
        installation: InstallationConfig,
        database: Database,
        blobs: BlobStore,
        registry: PluginRegistry,
        contributions: Contributions,
    ) -> None:
        self._installation, self._database, self._blobs, self._registry = installation, database, blobs, registry
        self._contributions = contributions
        self._process = new_id()
        self._began = time.monotonic()
        self._disk_is_full = False

    def all_checks(self) -> Mapping[str, Callable[[], Awaitable[CheckResult]]]:
        """Return all checks, keyed by name."""
        checks = {
            "database": self.check_database,
            "storage": self.check_storage,
            "queue": self.check_schedules,
            "plugins": self.check_plugins,
            "clock": self.check_clock_skew,
            "disk": self.check_disk_space,
        }
        return checks if self.mail is None else {**checks, "mail": self.mail.check_connection}

    async def check_database(self) -> CheckResult:
        """Check whether the database accepts writes, and check the load of the connection pool."""
        began = time.monotonic()
        try:
            await self._database.work(lambda: acquire_lease(PROBE, self._process, 0.0))
        except Problem as problem:
            self._disk_is_full = problem.code == "storage_full"
            raise
        self._disk_is_full = False
        took, (used, size) = time.monotonic() - began, self._database.connection_usage()
        if took > SLOW_WRITE:
            return "degraded", f"A write took {took * 1000:.0f} ms."
        if used / size > POOL_FULL:
            return "degraded", f"{used / size:.0%} of the connections are in use."
        return "ok", "The database accepts writes."

    async def check_storage(self) -> CheckResult:
        """Check the file storage: store, read and delete a probe file."""
        began = time.monotonic()
        await self._blobs.probe()
        took = time.monotonic() - began
        if took > SLOW_PROBE:
            return "degraded", f"The file store took {took * 1000:.0f} ms to store a test file."
        return "ok", "The file store accepts files."

    async def check_schedules(self) -> CheckResult:
        """Check whether any process runs the schedules."""
        names = [item.name for _, item in self._contributions.for_hook("corral_schedules")]
        due, last = await self._database.work(lambda: (_earliest_due_time(names), last_recorded_time()), read=True)
        if due is None:
            if time.monotonic() - self._began < OVERDUE:
                return "ok", "The first schedules have not run yet."
            return "down", "No schedule has ever run because no process runs jobs."
        now = clock.time_s()
        late, idle = now - clock.parse_instant(due), now - clock.parse_instant(last)
        if late <= OVERDUE:
            return "ok", "Jobs and schedules run on time."
        if idle <= OVERDUE:
            return "degraded", f"A schedule is {late:.0f} s late: the processes that run jobs do not keep up."
        told = f"No schedule has run for {idle:.0f} s: no process runs jobs, or those that do are blocked."
        return "down", f"{told} Start one: corral jobs"

    async def check_plugins(self) -> CheckResult:
        """Check whether all enabled plugins are active."""
        amiss = [item for item in self._registry.all() if item.state in ("failed", "blocked", "quarantined")]
        if not amiss:
            return "ok", "All plugins are active."
        told = ", ".join(f"{item.name} is {item.state}" for item in amiss)
        protected = any(item.protected for item in amiss if item.state != "quarantined")
        return "down" if protected else "degraded", f"{told}."

    async def check_clock_skew(self) -> CheckResult:
        """Compare the clock of Corral with that of the database server.

        If the database is a file, compare it with the system clock instead: if the system clock is set back, the clock
        of Corral keeps running and is ahead for a while.
        """
        if self._database.is_file:
            ahead = clock.time_s() - clock.system_time_s()
            if ahead <= SKEW:
                return "ok", "The database is a file on this machine, so the clocks cannot differ."
            sentence = f"The clock of this machine was set back. Corral is {ahead:.0f} s ahead of it, and slows down."
            return "degraded", sentence
        before = clock.time_s()
        there = await self._database.work(_server_seconds, read=True)
        skew = max(0.0, before - there, there - clock.time_s())
        status = "down" if skew > WRONG_CLOCK else "degraded" if skew > SKEW else "ok"
        return status, f"The clock of this machine differs from the clock of the database by {skew:.1f} s."

    async def check_disk_space(self) -> CheckResult:
        """Check the free space on the disk that contains the data folder."""
        usage = await asyncio.to_thread(shutil.disk_usage, self._installation.data_dir)
        free = usage.free / usage.total
        if self._disk_is_full:
            return "down", "The database's disk is full or defective."
        status = "down" if free < NOTHING_LEFT else "degraded" if free < LITTLE else "ok"
        return status, f"{free:.0%} of the disk with the data folder is free."


def _earliest_due_time(names: list[str]) -> str | None:
    found = ScheduleRow.select(peewee.fn.MIN(ScheduleRow.next_at)).where(ScheduleRow.name.in_(names)).tuples().first()
    return None if found is None else found[0]


def last_recorded_time() -> str:
    """Return the last time at which any schedule of this installation ran. Runs in the caller's unit of work."""
    return str(ScheduleRow.select(peewee.fn.MAX(ScheduleRow.last_at)).scalar() or clock.FIRST)


def _server_seconds() -> float:
    """Return the PostgreSQL server's current time in seconds since the epoch."""
    return float(execute("SELECT EXTRACT(EPOCH FROM clock_timestamp())").fetchone()[0])
