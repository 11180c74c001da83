"""The in-process runner: takes what is due by guarded updates, so that any number of processes do each once."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corral import clock
from corral.database.engine import Database
from corral.database.unit import SYSTEM_ENTRY, Entry
from corral.errors import Unavailable
from corral.ids import new_id
from corral.jobs.job import Job, JobRow, Schedule, ScheduleRow
from corral.jobs.queue import JobQueue

log = logging.getLogger("corral.jobs")

LOOK_EVERY = 1.0
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 2.0, 600.0
SCHEDULE_LEASE_SECONDS = 15.0  # after a kill in the middle, the slot is due again then
SKEW_SECONDS = 60.0  # by which clocks may differ; a slot that lies further ahead is from before one was set back
FORGOTTEN_AFTER = 2.0  # what a shared queue has not brought by then is taken from the table


class LeaseLost(Exception):
    """The job was given to another process; what this one did in its unit is rolled back."""


class Room:
    """Places for jobs; their number may change while some are taken. Only the event loop uses it."""

    def __init__(self, size: int) -> None:
        self._size, self._taken = size, 0
        self._freed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether `acquire` would wait."""
        return self._taken >= self._size

    async def acquire(self) -> None:
        """Take a place, once there is one."""
        while self.is_full:
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1

    def release(self) -> None:
        """Give it back."""
        self._taken -= 1
        self._freed.set()

    def resize(self, size: int) -> None:
        """Have so many places from now on."""
        self._size = size
        self._freed.set()


class InProcessRunner:
    """Jobs and schedules of this process, with functions whose services are filled in.

    `is_open` tells whether the plugin of a job or schedule is in service; what is not waits. With a `queue`, new jobs
    are announced there and come back to some process by `take`; without one this process does them itself.
    """

    def __init__(
        self,
        database: Database,
        jobs: Mapping[str, tuple[Job, Callable[..., Any]]],
        schedules: Mapping[str, tuple[Schedule, Callable[..., Any]]],
        *,
        concurrency: int = 8,
        is_open: Callable[[str], bool] = lambda name: True,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._database, self._jobs, self._schedules, self._is_open = database, jobs, schedules, is_open
        self._redact = redact  # what errors say is stored
        self._bell = asyncio.Event()
        self.queue: JobQueue | None = None
        self._room = Room(concurrency)
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()
        self._next: dict[str, float] = {}
        self.ticked_at: float = clock.time_s()

    def limit(self, concurrency: int) -> None:
        """How many jobs run at a time; those beyond it that run already come to their end."""
        self._room.resize(concurrency)
        self._bell.set()

    def announce(self, ids: Sequence[str]) -> None:
        """There are new job rows, which are due."""
        if self.queue is not None:
            self.queue.put(ids)
        else:
            self._bell.set()

    async def take(self, identifier: str) -> None:
        """Begin this job, if it is still to be done; returns when there is room for another."""
        await self._room.acquire()
        claimed = None
        try:
            claimed = None if self._closed else await self._claim(identifier)
        finally:
            if claimed is None:
                self._room.release()
        if claimed is not None:
            self._start(self._released(self._perform(*claimed)))

    async def run(self) -> None:
        """Work for ever; supervised by the kernel."""
        try:
            while True:
                try:
                    wait = await self._tick()
                except Exception as error:
                    log.error("the runner cannot look for work: %s", error, exc_info=not isinstance(error, Unavailable))
                    wait = LOOK_EVERY
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._bell.wait()
                self._bell.clear()
        finally:
            for task in tuple(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def settle(self, seconds: float) -> None:
        """Begin nothing more, and let what runs come to its end, for at most so long."""
        self._closed = True
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _tick(self) -> float:
        self.ticked_at = clock.time_s()
        if self._closed:
            return LOOK_EVERY
        for name, (schedule, run) in self._schedules.items():
            left = self._next.get(name, 0.0) - self.ticked_at
            if not 0.0 < left <= schedule.every_seconds and self._is_open(name):
                self._next[name] = await self._slot(schedule, run)
        while not self._room.is_full and (row := await self._claim()) is not None:
            await self._room.acquire()
            self._start(self._released(self._perform(*row)))
        due = min([*(at for name, at in self._next.items() if self._is_open(name)), self.ticked_at + LOOK_EVERY])
        return min(LOOK_EVERY, max(0.02, due - clock.time_s()))

    async def _released(self, work: Any) -> None:
        try:
            await work
        finally:
            self._room.release()
            self._bell.set()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # -- schedules

    async def _slot(self, schedule: Schedule, run: Callable[..., Any]) -> float:
        """Take the slot if it is due and nobody has it; returns when to look again (epoch seconds)."""
        row = await self._database.work(lambda: ScheduleRow.get_or_none(ScheduleRow.name == schedule.name), read=True)
        now = clock.time_s()
        if row is None:
            await self._database.work(
                lambda: ScheduleRow.insert(name=schedule.name, next_at=clock.now()).on_conflict_ignore().execute()
            )
            return now
        if clock.now() < row.next_at <= clock.now(max(schedule.every_seconds, SCHEDULE_LEASE_SECONDS) + SKEW_SECONDS):
            return min(clock.parse_instant(row.next_at), now + schedule.every_seconds)
        lease = clock.now(max(schedule.every_seconds, SCHEDULE_LEASE_SECONDS))
        mine = (ScheduleRow.name == schedule.name) & (ScheduleRow.next_at == row.next_at)
        if await self._database.work(ScheduleRow.update(next_at=lease, last_at=clock.now()).where(mine).execute):
            self._start(self._run_slot(schedule, run, lease, now))
        return now + schedule.every_seconds

    async def _run_slot(self, schedule: Schedule, run: Callable[..., Any], lease: str, began: float) -> None:
        def finish(error: str | None = None) -> None:
            following = clock.format_instant(max(began + schedule.every_seconds, clock.time_s()))
            mine = (ScheduleRow.name == schedule.name) & (ScheduleRow.next_at == lease)
            ScheduleRow.update(next_at=following, error=error).where(mine).execute()

        try:
            await self._call(schedule.name, run, {}, finish)
        except Exception as failure:
            error = self._redact(f"{type(failure).__name__}: {failure}")[:1000]
            log.exception("schedule failed", extra={"schedule": schedule.name})
            await self._write(lambda: finish(error))

    # -- jobs

    async def _claim(self, only: str | None = None) -> tuple[JobRow, str] | None:
        row = await self._database.work(lambda: self._due(only), read=True)
        if row is None:
            return None
        if row.state == "running" and row.attempts >= self._jobs[row.name][0].max_attempts:
            await self._database.work(lambda: self._give_up(row))
            return None
        lease = new_id()
        if not await self._database.work(lambda: self._take(row, lease)):
            return None
        return row, lease

    @staticmethod
    def _give_up(row: JobRow) -> None:
        """Its process died every time: it ends here, or it would take one process down after the other."""
        error = f"Its process ended during each of {row.attempts} attempts."
        mine = (JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == "running")
        JobRow.update(state="failed", lease=None, finished_at=clock.now(), error=error).where(mine).execute()

    def _due(self, only: str | None) -> JobRow | None:
        """The job `only`, else the first one; what was announced to a shared queue is left to it for a while."""
        names = [name for name in self._jobs if self._is_open(name)]
        where = JobRow.state.in_(("queued", "running")) & (JobRow.run_at <= clock.now()) & JobRow.name.in_(names)
        if only is not None:
            where &= JobRow.id == only
        elif self.queue is not None:
            announced = (JobRow.attempts == 0) & (JobRow.run_at <= JobRow.created_at)
            where &= ~announced | (JobRow.run_at <= clock.now(-FORGOTTEN_AFTER))
        row: JobRow | None = JobRow.select().where(where).order_by(JobRow.run_at).first()
        return row

    def _take(self, row: JobRow, lease: str) -> int:
        """`run_at` of a running job is the end of its lease: what is past it may be taken again."""
        seconds = self._jobs[row.name][0].seconds
        return int(
            JobRow.update(state="running", lease=lease, attempts=row.attempts + 1, run_at=clock.now(seconds))
            .where((JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == row.state))
            .execute()
        )

    async def _perform(self, row: JobRow, lease: str) -> None:
        """A job that ends in the middle because its process ends is given back; the attempt does not count. Who waited
        for something that was cancelled has failed.
        """
        job, run = self._jobs[row.name]

        def end(**changes: Any) -> None:
            mine = (JobRow.id == row.id) & (JobRow.lease == lease)
            if not JobRow.update(**changes, lease=None).where(mine).execute():
                raise LeaseLost

        try:
            await self._call(
                job.name, run, row.arguments, lambda: end(state="done", finished_at=clock.now(), error=None)
            )
        except LeaseLost:
            log.warning("a job took longer than its lease", extra={"job": job.name})
        except (Exception, asyncio.CancelledError) as failure:
            ending = isinstance(failure, asyncio.CancelledError) and _is_ending()
            back = {"state": "queued", "run_at": clock.now(), "attempts": row.attempts}
            changes = back if ending else self._failure(job, row, failure)
            with contextlib.suppress(LeaseLost):
                await self._write(lambda: end(**changes))
            if ending:
                raise

    async def _write(self, end: Callable[[], None], entry: Entry = SYSTEM_ENTRY) -> None:
        """How something ended. While the database is away it waits; what was given to another process is guarded."""
        while True:
            try:
                return await self._database.work(end, entry=entry)
            except Unavailable:
                if _is_ending():
                    raise
            await asyncio.sleep(LOOK_EVERY)

    def _failure(self, job: Job, row: JobRow, failure: BaseException) -> dict[str, Any]:
        log.warning("job failed", extra={"job": job.name, "attempt": row.attempts + 1}, exc_info=failure)
        error = self._redact(f"{type(failure).__name__}: {failure}")[:1000]
        if row.attempts + 1 >= job.max_attempts:
            return {"state": "failed", "finished_at": clock.now(), "error": error}
        delay = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2**row.attempts)
        return {"state": "queued", "run_at": clock.now(delay), "error": error}

    async def _call(
        self, label: str, run: Callable[..., Any], arguments: Mapping[str, Any], finish: Callable[[], None]
    ) -> None:
        """`finish` belongs to the unit of a `def`: both take effect, or neither, whenever the process is killed."""
        entry = Entry(f"job {label}")
        if inspect.iscoroutinefunction(run):
            await run(**arguments)
            await self._write(finish, entry)
        else:

            def both() -> None:
                run(**arguments)
                finish()

            await self._database.work(both, entry=entry)


def _is_ending() -> bool:
    """Whether the current task itself is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
