"""The in-process job runner. It claims due jobs by conditional updates, so only one process runs each job."""

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

POLL_SECONDS = 1.0
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 2.0, 600.0
SCHEDULE_LEASE_SECONDS = 15.0  # a schedule whose process was killed is due again after this time
SKEW_SECONDS = 60.0  # largest clock difference; a due time further ahead was written before a clock was set back
QUEUE_GRACE_SECONDS = 2.0  # a job that the shared queue has not delivered by then is claimed from the table


class LeaseLost(Exception):
    """Raised when another process has claimed the job meanwhile. This process's unit of work is rolled back."""


class ConcurrencySlots:
    """Slots that limit the number of running jobs. The limit may change at any time. For use on the event loop only."""

    def __init__(self, size: int) -> None:
        self._size, self._taken = size, 0
        self._freed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether `acquire` would wait."""
        return self._taken >= self._size

    async def acquire(self) -> None:
        """Acquire a slot, waiting until one is free."""
        while self.is_full:
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1

    def release(self) -> None:
        """Release a slot."""
        self._taken -= 1
        self._freed.set()

    def resize(self, size: int) -> None:
        """Change the number of slots."""
        self._size = size
        self._freed.set()


class InProcessRunner:
    """Runs the jobs and schedules of this process. Their functions are already bound to services.

    Jobs and schedules for which `is_open` is false wait until their plugin is in service again. With a `queue`, new
    jobs are announced there and reach one of the processes by `take`. Without a queue, this process runs new jobs
    itself.
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
        self._redact = redact  # error messages are stored, so they are redacted first
        self._wake_up = asyncio.Event()
        self.queue: JobQueue | None = None
        self._slots = ConcurrencySlots(concurrency)
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()
        self._next: dict[str, float] = {}
        self.ticked_at: float = clock.time_s()

    def limit(self, concurrency: int) -> None:
        """Change the number of jobs that run at a time. Running jobs above the new limit finish normally."""
        self._slots.resize(concurrency)
        self._wake_up.set()

    def announce(self, ids: Sequence[str]) -> None:
        """Announce new job rows that are due."""
        if self.queue is not None:
            self.queue.put(ids)
        else:
            self._wake_up.set()

    async def take(self, identifier: str) -> None:
        """Start this job if it is still due. Waits for a free slot first."""
        await self._slots.acquire()
        claimed = None
        try:
            claimed = None if self._closed else await self._claim(identifier)
        finally:
            if claimed is None:
                self._slots.release()
        if claimed is not None:
            self._start(self._released(self._perform(*claimed)))

    async def run(self) -> None:
        """Run jobs and schedules until cancelled. The kernel supervises this task."""
        try:
            while True:
                try:
                    wait = await self._tick()
                except Exception as error:
                    log.error(
                        "the job runner cannot read its tables: %s", error, exc_info=not isinstance(error, Unavailable)
                    )
                    wait = POLL_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake_up.wait()
                self._wake_up.clear()
        finally:
            for task in tuple(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def settle(self, seconds: float) -> None:
        """Start no further jobs and wait until the running jobs finish, for at most `seconds`."""
        self._closed = True
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _tick(self) -> float:
        self.ticked_at = clock.time_s()
        if self._closed:
            return POLL_SECONDS
        for name, (schedule, run) in self._schedules.items():
            left = self._next.get(name, 0.0) - self.ticked_at
            if not 0.0 < left <= schedule.every_seconds and self._is_open(name):
                self._next[name] = await self._slot(schedule, run)
        while not self._slots.is_full and (row := await self._claim()) is not None:
            await self._slots.acquire()
            self._start(self._released(self._perform(*row)))
        due = min([*(at for name, at in self._next.items() if self._is_open(name)), self.ticked_at + POLL_SECONDS])
        return min(POLL_SECONDS, max(0.02, due - clock.time_s()))

    async def _released(self, work: Any) -> None:
        try:
            await work
        finally:
            self._slots.release()
            self._wake_up.set()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # Schedules

    async def _slot(self, schedule: Schedule, run: Callable[..., Any]) -> float:
        """Run the schedule if it is due and not claimed. Return the next time to check, in epoch seconds."""
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

    # Jobs

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
        """Mark a job as failed if its process died in every attempt, so that it cannot terminate more processes."""
        error = f"Its process ended during each of {row.attempts} attempts."
        mine = (JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == "running")
        JobRow.update(state="failed", lease=None, finished_at=clock.now(), error=error).where(mine).execute()

    def _due(self, only: str | None) -> JobRow | None:
        """Return the job `only`, or else the first due job.

        Jobs announced to a shared queue are left to the queue for a grace period.
        """
        names = [name for name in self._jobs if self._is_open(name)]
        where = JobRow.state.in_(("queued", "running")) & (JobRow.run_at <= clock.now()) & JobRow.name.in_(names)
        if only is not None:
            where &= JobRow.id == only
        elif self.queue is not None:
            announced = (JobRow.attempts == 0) & (JobRow.run_at <= JobRow.created_at)
            where &= ~announced | (JobRow.run_at <= clock.now(-QUEUE_GRACE_SECONDS))
        row: JobRow | None = JobRow.select().where(where).order_by(JobRow.run_at).first()
        return row

    def _take(self, row: JobRow, lease: str) -> int:
        """Claim the job.

        For a running job, `run_at` is the end of its lease. The job may be claimed again after that.
        """
        seconds = self._jobs[row.name][0].seconds
        return int(
            JobRow.update(state="running", lease=lease, attempts=row.attempts + 1, run_at=clock.now(seconds))
            .where((JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == row.state))
            .execute()
        )

    async def _perform(self, row: JobRow, lease: str) -> None:
        """Run a claimed job and record its result.

        A job that is interrupted because its process stops is queued again, and the attempt is not counted. A job that
        fails because something it awaited was cancelled has failed.
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
            log.warning("job lost its lease", extra={"job": job.name})
        except (Exception, asyncio.CancelledError) as failure:
            interrupted = isinstance(failure, asyncio.CancelledError) and _is_cancelled()
            again = {"state": "queued", "run_at": clock.now(), "attempts": row.attempts}
            changes = again if interrupted else self._failure(job, row, failure)
            with contextlib.suppress(LeaseLost):
                await self._write(lambda: end(**changes))
            if interrupted:
                raise

    async def _write(self, end: Callable[[], None], entry: Entry = SYSTEM_ENTRY) -> None:
        """Record a result, retrying while the database is unavailable.

        `end` checks that this process still owns the row.
        """
        while True:
            try:
                return await self._database.work(end, entry=entry)
            except Unavailable:
                if _is_cancelled():
                    raise
            await asyncio.sleep(POLL_SECONDS)

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
        """Call the function of a job or schedule.

        For a `def`, `finish` runs in the same unit, so that both commit or neither.
        """
        entry = Entry(f"job {label}")
        if inspect.iscoroutinefunction(run):
            await run(**arguments)
            await self._write(finish, entry)
        else:

            def both() -> None:
                run(**arguments)
                finish()

            await self._database.work(both, entry=entry)


def _is_cancelled() -> bool:
    """Return whether the current task itself is being cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
