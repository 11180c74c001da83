"""What time does to workers: silence takes them offline, and long silence removes them."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.credentials import Credentials
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.events.event import SystemAlert, emit
from corral.plugin import Settings
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerDeleted, WorkerOffline
from corral_plugins.workers.models import Alert, RegistrationKey, Worker
from corral_plugins.workers.service import rows, tokens

NO_WORKER = "no_worker"
WAITS_MS = 60_000
AT_ONCE = 200
DAY = 86_400
KEY_KEPT_DAYS = 30


class Sweeps:
    """One a kernel; the schedules call it."""

    tasks: Tasks | None

    def __init__(self, settings: Settings, credentials: Credentials, work: Work) -> None:
        self._settings, self._credentials, self._work = settings, credentials, work

    async def sweep(self) -> None:
        """Take silent workers offline, and tell admins when tasks wait for a worker that is not there."""
        entry = Entry("job workers.sweep")
        if await self._work(self._is_due, entry=entry, read=True):
            await self._work(self.sweep_now, entry=entry)

    def sweep_now(self) -> None:
        """The same, in the caller's unit."""
        self._take_offline()
        self._alert()

    async def prune(self) -> None:
        """Remove offline workers that nobody has heard for long, and keys that are long over."""
        days = self._settings.get(declared.PRUNE_DAYS)
        before = clock.now(-days * DAY) if days is not None else None
        while before is not None and await self._work(lambda: self._prune(before)) == AT_ONCE:
            continue
        await self._work(self._prune_keys)

    def _is_due(self) -> bool:
        """Whether a write is worth while."""
        return bool(Worker.select().where(self._silent()).exists()) or self._lacks_worker() != self._is_told()

    def _silent(self) -> Any:
        before = clock.now(-declared.offline_after(self._settings))
        return (Worker.status == "online") & (Worker.last_seen_at < before)

    def _take_offline(self) -> None:
        gone = (
            Worker.update(status="offline", version=Worker.version + 1, updated_at=clock.now())
            .where(self._silent())
            .returning(Worker)
            .execute()
        )
        for row in gone:
            rows.tell(WorkerOffline, row, last_heartbeat_at=row.last_heartbeat_at, leases=row.active_leases)

    def _lacks_worker(self) -> bool:
        if self.tasks is None or Worker.select().where(Worker.status == "online").exists():
            return False
        oldest = self.tasks.queue_figures().oldest_pending_ms
        return oldest is not None and oldest >= WAITS_MS

    @staticmethod
    def _is_told() -> bool:
        return bool(Alert.select().where(Alert.kind == NO_WORKER).exists())

    def _alert(self) -> None:
        """Once, until a worker is there again or nothing waits."""
        if not self._lacks_worker():
            Alert.delete().where(Alert.kind == NO_WORKER).execute()
        elif Alert.insert(kind=NO_WORKER, since=clock.now()).on_conflict_ignore().as_rowcount().execute():
            alert = SystemAlert(
                kind=NO_WORKER,
                severity="warning",
                title="Tasks wait and no worker is online",
                detail="A task has waited for 60 seconds. Start a worker (corral worker), or approve one that waits.",
            )
            emit(alert, object=("system", NO_WORKER))

    def _prune(self, before: str) -> int:
        """At most `AT_ONCE`; how many."""
        silent = (Worker.status == "offline") & (Worker.last_seen_at < before) & (Worker.active_leases == 0)
        old = Worker.select(Worker.id).where(silent).limit(AT_ONCE)
        gone = list(Worker.delete().where(Worker.id.in_(old) & silent).returning(Worker).execute())
        for row in gone:
            tokens.forget_worker(self._credentials, row.id)
            rows.tell(WorkerDeleted, row)
        return len(gone)

    @staticmethod
    def _prune_keys() -> None:
        RegistrationKey.delete().where(RegistrationKey.expires_at < clock.now(-KEY_KEPT_DAYS * DAY)).execute()
