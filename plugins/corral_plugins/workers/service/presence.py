"""Signs of life: who has called lately. Kept in memory and written together, so that a call costs no write."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable

from corral import clock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import Entry, before_commit, current
from corral.plugin import Settings
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerOnline
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import rows

log = logging.getLogger("corral.workers")

WRITE_EVERY = 5.0
LISTENING_GRACE = 5.0
AT_ONCE = 500

_SEEN = Statement(
    lambda p: (
        Worker.select(Worker.status, Worker.last_seen_at, Worker.listening_until).where(Worker.id == p("id")).tuples()
    )
)


class Presence:
    """One a kernel. `note` and `listens` may be called from any thread, outside a unit too."""

    def __init__(self, settings: Settings, work: Work) -> None:
        self._settings, self._work = settings, work
        self._noted: dict[str, None] = {}
        self._listening: dict[str, float] = {}
        self._told: dict[str, float] = {}

    @property
    def every(self) -> float:
        """Seconds between two writes of a worker's signs of life."""
        return min(WRITE_EVERY, declared.offline_after(self._settings) / 3)

    def note(self, worker_id: str) -> None:
        """The worker has called; written with the next `flush`."""
        self._noted[worker_id] = None

    def listens(self, worker_id: str, until: float) -> None:
        """The worker has an open `signals` call (epoch seconds)."""
        self._listening[worker_id] = until + LISTENING_GRACE

    def alive(self, worker_id: str) -> None:
        """A sign of life, in a unit: written at its end, if the last one is some seconds old. Ends being offline."""
        if current().read_only:
            self.note(worker_id)
            return
        found = _SEEN.one({"id": worker_id})
        if found is not None and (found[0] == "offline" or found[1] < clock.now(-self.every)):
            before_commit(lambda: self._seen([worker_id]))

    def is_listening(self, worker_id: str) -> bool:
        """Whether the worker hears signals at once, through this process or another."""
        if self._listening.get(worker_id, 0.0) > clock.time_s():
            return True
        found = _SEEN.one({"id": worker_id})
        return found is not None and bool(found[2] > clock.now())

    async def run(self) -> None:
        """Write what was noted, for ever."""
        while True:
            await asyncio.sleep(self.every)
            try:
                await self.flush()
            except Exception:
                log.exception("signs of life could not be written")

    async def flush(self) -> None:
        """Write what was noted since the last time."""
        noted, self._noted = list(self._noted), {}
        now = clock.time_s()
        self._listening = {key: until for key, until in self._listening.copy().items() if until > now}
        fresh = {key: until for key, until in self._listening.items() if self._told.get(key) != until}
        self._told = dict(self._listening)
        if not noted and not fresh:
            return
        for start in range(0, len(noted), AT_ONCE):
            part = noted[start : start + AT_ONCE]
            await self._work(lambda part=part: self._seen(part), entry=Entry("workers.presence"))  # type: ignore[misc]  # bound per round
        if fresh:
            await self._work(lambda: self._write_listening(fresh), entry=Entry("workers.presence"))

    def _seen(self, ids: Iterable[str]) -> None:
        """Move the last sign of life, and bring back who was offline."""
        ids, now = sorted(ids), clock.now()
        mine = Worker.id.in_(ids)
        Worker.update(last_seen_at=now).where(mine & (Worker.last_seen_at < clock.now(-self.every))).execute()
        for row in Worker.select().where(mine & (Worker.status == "offline")):
            if rows.change((Worker.id == row.id) & (Worker.status == "offline"), status="online", last_seen_at=now):
                row.status = "online"
                rows.tell(WorkerOnline, row)

    @staticmethod
    def _write_listening(fresh: dict[str, float]) -> None:
        """Ends within five seconds of each other are one."""
        groups: dict[float, list[str]] = defaultdict(list)
        for worker_id, until in fresh.items():
            groups[until // 5 * 5].append(worker_id)
        for until, ids in groups.items():
            instant = clock.format_instant(until)
            Worker.update(listening_until=instant).where(Worker.id.in_(ids)).execute()
