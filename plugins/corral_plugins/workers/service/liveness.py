"""The liveness of workers: when each worker was last seen, and periodic checks for workers that stopped making calls.

Workers' calls are noted in memory and written to the database in batches, so that a call does not need its own write.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from corral import clock
from corral.auth.credentials import Credentials
from corral.database.engine import Database, Work
from corral.database.statement import Statement
from corral.database.unit import UnitContext, before_commit, current
from corral.events.event import SystemAlert, emit
from corral.plugin import Settings
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerDeleted, WorkerOffline, WorkerOnline
from corral_plugins.workers.models import ActiveWorkerAlert, Worker
from corral_plugins.workers.service import repository

log = logging.getLogger("corral.workers")

MAX_WRITE_INTERVAL = 5.0
LISTENING_GRACE = 5.0
WRITE_CHUNK, PRUNE_CHUNK = 500, 200
NO_WORKER, NO_WORKER_AFTER_MS = "no_worker", 60_000
DAY = 86_400
ENTRY = UnitContext("workers.liveness")

_LAST_SEEN = Statement(
    lambda p: (
        Worker.select(Worker.status, Worker.last_seen_at, Worker.listening_until).where(Worker.id == p("id")).tuples()
    )
)


class WorkerLiveness:
    """Records when each worker was last seen.

    `note_contact` and `note_listening` may be called from any thread, with or without a unit of work.
    """

    def __init__(self, settings: Settings, work: Work) -> None:
        self._settings, self._work = settings, work
        self._noted: dict[str, None] = {}
        self._listening: dict[str, float] = {}
        self._written: dict[str, float] = {}

    @property
    def write_interval(self) -> float:
        """The minimum number of seconds between two updates of the same worker's `last_seen_at`."""
        return min(MAX_WRITE_INTERVAL, declared.offline_seconds(self._settings) / 3)

    def note_contact(self, worker_id: str) -> None:
        """Note in memory that the worker made a call. `write_contacts` later updates the database."""
        self._noted[worker_id] = None

    def note_listening(self, worker_id: str, until: float) -> None:
        """Note in memory that the worker has an open `signals` call.

        The call ends at `until`, which is in seconds since the epoch.
        """
        self._listening[worker_id] = until + LISTENING_GRACE

    def record_contact(self, worker_id: str) -> None:
        """Record that the worker made a call, as described in `Workers.record_contact`."""
        if current().read_only:
            self.note_contact(worker_id)
            return
        found = _LAST_SEEN.one({"id": worker_id})
        if found is not None and (found[0] == "offline" or found[1] < clock.now(-self.write_interval)):
            before_commit(lambda: self._write_seen([worker_id]))

    def is_listening(self, worker_id: str) -> bool:
        """Return whether the worker has an open `signals` call to any server process."""
        if self._listening.get(worker_id, 0.0) > clock.time_s():
            return True
        found = _LAST_SEEN.one({"id": worker_id})
        return found is not None and bool(found[2] > clock.now())

    async def write_regularly(self) -> None:
        """Write the noted contacts every `write_interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(self.write_interval)
            try:
                await self.write_contacts()
            except Exception:
                log.exception("the last contact times of workers could not be written")

    async def write_contacts(self) -> None:
        """Write to the database which workers made calls since the last write."""
        noted, self._noted = list(self._noted), {}
        now = clock.time_s()
        self._listening = {key: until for key, until in self._listening.copy().items() if until > now}
        changed = {key: until for key, until in self._listening.items() if self._written.get(key) != until}
        self._written = dict(self._listening)
        for start in range(0, len(noted), WRITE_CHUNK):
            await self._work(functools.partial(self._write_seen, noted[start : start + WRITE_CHUNK]), entry=ENTRY)
        if changed:
            await self._work(lambda: _write_listening(changed), entry=ENTRY)

    def _write_seen(self, ids: Iterable[str]) -> None:
        """Update `last_seen_at` of the workers, and set offline workers to `online`."""
        ids, now = sorted(ids), clock.now()
        mine = Worker.id.in_(ids)
        Worker.update(last_seen_at=now).where(mine & (Worker.last_seen_at < clock.now(-self.write_interval))).execute()
        offline: Any = Worker.select(Worker.id).where(mine & (Worker.status == "offline")).tuples()
        for (worker_id,) in list(offline):
            if (row := repository.bring_online(worker_id, last_seen_at=now)) is not None:
                repository.publish_worker_event(WorkerOnline, row)


def _write_listening(changed: dict[str, float]) -> None:
    """Set `listening_until` of the workers.

    The times are rounded down to a multiple of five seconds, so that most workers share one update.
    """
    groups: dict[float, list[str]] = defaultdict(list)
    for worker_id, until in changed.items():
        groups[until // 5 * 5].append(worker_id)
    for until, ids in groups.items():
        Worker.update(listening_until=clock.format_instant(until)).where(Worker.id.in_(ids)).execute()


class WorkerSweeps:
    """The scheduled jobs for workers that have stopped making calls.

    The jobs change the status of these workers, raise and clear the alert `no_worker`, and delete old workers.
    """

    tasks: Tasks | None

    def __init__(self, settings: Settings, credentials: Credentials, database: Database) -> None:
        self._settings, self._credentials = settings, credentials
        self._database, self._work = database, database.work

    async def sweep_silent_workers(self) -> None:
        """Mark workers that have stopped making calls as `offline`.

        Alert admins if a task has been waiting for 60 s and no worker is online.
        """
        entry = UnitContext("job workers.sweep")
        if await self._database.read(self._is_sweep_needed, entry):
            await self._work(self.sweep_in_unit, entry=entry)

    def sweep_in_unit(self) -> None:
        """Mark workers that have stopped making calls as `offline`, and raise or clear the alert `no_worker`.

        The method runs in the caller's unit of work.
        """
        self._take_offline()
        self._raise_or_clear_alert()

    async def delete_old_workers(self) -> None:
        """Delete offline workers that have no leases and have made no calls for `workers.prune_days`."""
        days = self._settings.get(declared.PRUNE_DAYS)
        if days is None:
            return
        before = clock.now(-days * DAY)
        while await self._work(lambda: self._delete_batch(before)) == PRUNE_CHUNK:
            pass

    def _is_sweep_needed(self) -> bool:
        """Return whether a sweep would write anything. The check is cheaper than a sweep because it only reads."""
        return bool(Worker.select().where(self._silent_workers()).exists()) or self._lacks_worker() != _is_alerted()

    def _silent_workers(self) -> Any:
        before = clock.now(-declared.offline_seconds(self._settings))
        return (Worker.status == "online") & (Worker.last_seen_at < before)

    def _take_offline(self) -> None:
        gone = (
            Worker.update(status="offline", version=Worker.version + 1, updated_at=clock.now())
            .where(self._silent_workers())
            .returning(Worker)
            .execute()
        )
        for row in gone:
            repository.publish_worker_event(
                WorkerOffline, row, last_heartbeat_at=row.last_heartbeat_at, leases=row.active_leases
            )

    def _lacks_worker(self) -> bool:
        if self.tasks is None or Worker.select().where(Worker.status == "online").exists():
            return False
        oldest = self.tasks.queue_statistics().oldest_pending_ms
        return oldest is not None and oldest >= NO_WORKER_AFTER_MS

    def _raise_or_clear_alert(self) -> None:
        """Raise the alert `no_worker` once if a task has been waiting for 60 s and no worker is online.

        Clear the alert when this is no longer the case.
        """
        if not self._lacks_worker():
            ActiveWorkerAlert.delete().where(ActiveWorkerAlert.kind == NO_WORKER).execute()
        elif ActiveWorkerAlert.insert(kind=NO_WORKER, since=clock.now()).on_conflict_ignore().as_rowcount().execute():
            alert = SystemAlert(
                kind=NO_WORKER,
                severity="warning",
                title="Tasks are waiting, but no worker is online",
                detail="A task has waited for 60 seconds. Start a worker (corral worker), or approve a pending worker.",
            )
            emit(alert, object=("system", NO_WORKER))

    def _delete_batch(self, before: str) -> int:
        """Delete one batch of workers last seen before `before`. Return the number of deleted workers."""
        silent = (Worker.status == "offline") & (Worker.last_seen_at < before) & (Worker.active_leases == 0)
        old = Worker.select(Worker.id).where(silent).limit(PRUNE_CHUNK)
        gone = list(Worker.delete().where(Worker.id.in_(old) & silent).returning(Worker).execute())
        for row in gone:
            repository.forget_credentials(self._credentials, row.id)
            repository.publish_worker_event(WorkerDeleted, row)
        return len(gone)


def _is_alerted() -> bool:
    return bool(ActiveWorkerAlert.select().where(ActiveWorkerAlert.kind == NO_WORKER).exists())
