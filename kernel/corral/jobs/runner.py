"""The job runner of a process. It claims each job and schedule with a conditional update before running it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from corral import clock
from corral.database.engine import Database
from corral.database.unit import SYSTEM_CONTEXT, UnitContext
from corral.errors import Unavailable
from corral.events.live_feed import wait_and_clear
from corral.ids import new_id
from corral.jobs.job import Job, JobRow, Schedule, ScheduleRow
from corral.jobs.shared_queue import SharedJobQueue
from corral.supervisor import is_cancelled

log = logging.getLogger("corral.jobs")

POLL_SECONDS = 1.0
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 2.0, 600.0
SCHEDULE_LEASE_SECONDS = 15.0  # a schedule whose process was killed is due again after this time
SKEW_SECONDS = 60.0  # largest clock difference; a due time further ahead was written before a clock was set back
QUEUE_GRACE_SECONDS = 2.0  # a job that the shared queue has not delivered by then is claimed from the table


class LeaseLost(Exception):
    """Raised when another process has claimed the job in the meantime. This process's unit of work is rolled back."""


class JobRunner:
    """Runs the jobs and schedules of this process. Their functions are already bound to services.

    Jobs and schedules for which `is_open` is false wait until their plugin is in service again. With a `queue`, new
    jobs are announced there, and the process that receives an id calls `start_job`. Without a queue, this process runs
    new jobs itself.
    """

    def __init__(
        self,
        database: Database,
        jobs: Mapping[str, Job],
        schedules: Mapping[str, Schedule],
        *,
        is_open: Callable[[str], bool],
        redact: Callable[[str], str],
    ) -> None:
        self._database, self._jobs, self._schedules, self._is_open = database, jobs, schedules, is_open
        self._redact = redact  # error messages are stored, so they are redacted first
        self.queue: SharedJobQueue | None = None
        self._concurrency, self._taken_slots, self._slot_freed = 0, 0, asyncio.Event()
        self._wake_up = asyncio.Event()
        self._draining = False
        self._running: set[asyncio.Task[None]] = set()
        self._next_checks: dict[str, float] = {}  # of the schedules, in epoch seconds

    def set_concurrency(self, jobs: int) -> None:
        """Change the number of jobs that run at a time. Running jobs above the new limit finish normally."""
        self._concurrency = jobs
        self._slot_freed.set()
        self._wake_up.set()

    def announce(self, ids: Sequence[str]) -> None:
        """Announce new job rows that are due."""
        if self.queue is not None:
            self.queue.announce(ids)
        else:
            self._wake_up.set()

    async def start_job(self, only: str | None = None) -> bool:
        """Wait for a free slot, and start the first due job. Return whether a job was due.

        With `only`, start the job with this id if it is due.
        """
        while self._taken_slots >= self._concurrency:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self._taken_slots += 1
        claimed = None
        try:
            claimed = None if self._draining else await self._claim_job(only)
        finally:
            if claimed is None:
                self._release_slot()
        if claimed is None:
            return False
        self._start(self._run_job(*claimed)).add_done_callback(self._job_ended)
        return True

    async def run(self) -> None:
        """Run jobs and schedules until cancelled. The kernel runs this method in a supervised task."""
        try:
            while True:
                try:
                    wait = await self._tick()
                except Exception as error:  # must not end the running jobs
                    unexpected = not isinstance(error, Unavailable)
                    log.error("the job runner cannot read its tables: %s", error, exc_info=unexpected)
                    wait = POLL_SECONDS
                await wait_and_clear(self._wake_up, wait)
        finally:
            for task in tuple(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def drain(self, seconds: float) -> None:
        """Start no further jobs and wait until the running jobs finish, for at most `seconds`."""
        self._draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _tick(self) -> float:
        """Start everything that is due. Return the seconds until the tables must be read again."""
        now = clock.time_s()
        if self._draining:
            return POLL_SECONDS
        for name, schedule in self._schedules.items():
            left = self._next_checks.get(name, 0.0) - now
            if not 0.0 < left <= schedule.every_seconds and self._is_open(name):
                self._next_checks[name] = await self._start_if_due(schedule)
        while self._taken_slots < self._concurrency and await self.start_job():
            continue
        due = min((at for name, at in self._next_checks.items() if self._is_open(name)), default=math.inf)
        return min(max(0.02, due - clock.time_s()), POLL_SECONDS)  # also when the clock was set back during this tick

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    # Schedules

    async def _start_if_due(self, schedule: Schedule) -> float:
        """Start the schedule if it is due and not claimed. Return the time of the next check in epoch seconds."""
        now = clock.time_s()
        lease = clock.now(max(schedule.every_seconds, SCHEDULE_LEASE_SECONDS))
        next_at = await self._database.work(lambda: self._claim_schedule(schedule, lease))
        if next_at == lease:
            self._start(self._run_schedule(schedule, lease, now))
        return min(clock.parse_instant(next_at), now + schedule.every_seconds)

    @staticmethod
    def _claim_schedule(schedule: Schedule, lease: str) -> str:
        """If the schedule is due, claim it until `lease` with a single conditional upsert.

        Return its next due time, which is `lease` if this process claimed the schedule.
        """
        latest = max(schedule.every_seconds, SCHEDULE_LEASE_SECONDS) + SKEW_SECONDS
        is_due = (ScheduleRow.next_at <= clock.now()) | (ScheduleRow.next_at > clock.now(latest))
        claim = {"next_at": lease, "last_at": clock.now()}
        upsert = ScheduleRow.insert(name=schedule.name, **claim).on_conflict(
            conflict_target=[ScheduleRow.name], update=claim, where=is_due
        )
        if upsert.as_rowcount().execute():
            return lease
        return str(ScheduleRow.get_by_id(schedule.name).next_at)

    async def _run_schedule(self, schedule: Schedule, lease: str, began: float) -> None:
        def finish(error: str | None = None) -> None:
            following = clock.format_instant(max(began + schedule.every_seconds, clock.time_s()))
            mine = (ScheduleRow.name == schedule.name) & (ScheduleRow.next_at == lease)
            ScheduleRow.update(next_at=following, error=error).where(mine).execute()

        try:
            await self._call(schedule, {}, finish)
        except Exception as failure:
            error = self._error(failure)
            log.exception("schedule failed", extra={"schedule": schedule.name})
            await self._write(lambda: finish(error))

    # Jobs

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        self._release_slot()
        self._wake_up.set()

    def _release_slot(self) -> None:
        self._taken_slots -= 1
        self._slot_freed.set()

    async def _claim_job(self, only: str | None = None) -> tuple[JobRow, str] | None:
        """Return a due job and the lease under which this process may run it, or None."""
        row = await self._database.work(lambda: self._due_job(only), read=True)
        lease = new_id()
        if row is None or not await self._database.work(lambda: self._lease_job(row, lease)):
            return None
        return row, lease

    def _due_job(self, only: str | None) -> JobRow | None:
        """Return the first due job, or None. With `only`, return the job with this id if it is due.

        A job that was announced to the shared queue is skipped for a grace period, because a process that receives the
        announcement should run it.
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

    def _lease_job(self, row: JobRow, lease: str) -> bool:
        """Claim the job and return whether this process may run it.

        The claim fails if another process was faster. For a running job, `run_at` is the end of its lease; after that,
        the job may be claimed again. A job whose process died in every attempt is marked as failed instead, so that it
        cannot terminate more processes.
        """
        job = self._jobs[row.name]
        changes: dict[str, Any]
        if is_given_up := row.state == "running" and row.attempts >= job.max_attempts:
            error = f"The process that ran the job ended during each of {row.attempts} attempts."
            changes = {"state": "failed", "lease": None, "finished_at": clock.now(), "error": error}
        else:
            run_until, attempts = clock.now(job.lease_seconds), row.attempts + 1
            changes = {"state": "running", "lease": lease, "attempts": attempts, "run_at": run_until}
        unchanged = (JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == row.state)
        return bool(JobRow.update(changes).where(unchanged).execute()) and not is_given_up

    async def _run_job(self, row: JobRow, lease: str) -> None:
        """Run a claimed job and record its result.

        A job that is interrupted because its process stops is queued again, and the attempt is not counted. If a
        `CancelledError` ends the job for any other reason, the job has failed.
        """
        job = self._jobs[row.name]

        def end(**changes: Any) -> None:
            mine = (JobRow.id == row.id) & (JobRow.lease == lease)
            if not JobRow.update(**changes, lease=None).where(mine).execute():
                raise LeaseLost

        try:
            await self._call(job, row.arguments, lambda: end(state="done", finished_at=clock.now(), error=None))
        except LeaseLost:
            log.warning("job lost its lease", extra={"job": job.name})
        except (Exception, asyncio.CancelledError) as failure:
            interrupted = isinstance(failure, asyncio.CancelledError) and is_cancelled()
            again = {"state": "queued", "run_at": clock.now(), "attempts": row.attempts}
            changes = again if interrupted else self._after_failure(job, row, failure)
            with contextlib.suppress(LeaseLost):
                await self._write(lambda: end(**changes))
            if interrupted:
                raise

    def _after_failure(self, job: Job, row: JobRow, failure: BaseException) -> dict[str, Any]:
        """Log the failure, and return the changes to the job's row.

        The job is queued for another attempt, or marked as failed after its last attempt.
        """
        log.warning("job failed", extra={"job": job.name, "attempt": row.attempts + 1}, exc_info=failure)
        error = self._error(failure)
        if row.attempts + 1 >= job.max_attempts:
            return {"state": "failed", "finished_at": clock.now(), "error": error}
        delay = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2**row.attempts)
        return {"state": "queued", "run_at": clock.now(delay), "error": error}

    def _error(self, failure: BaseException) -> str:
        return self._redact(f"{type(failure).__name__}: {failure}")[:1000]

    async def _call(self, item: Job | Schedule, arguments: Mapping[str, Any], finish: Callable[[], None]) -> None:
        """Call the function of a job or schedule.

        `finish` is called afterwards to record the success. For a `def`, it runs in the same unit, so that either both
        commit or neither does.
        """
        entry = UnitContext(f"job {item.name}")
        if inspect.iscoroutinefunction(item.run):
            await item.run(**arguments)
            await self._write(finish, entry)
        else:

            def both() -> None:
                item.run(**arguments)
                finish()

            await self._database.work(both, entry=entry)

    async def _write(self, end: Callable[[], None], entry: UnitContext = SYSTEM_CONTEXT) -> None:
        """Record a result, retrying while the database is unavailable.

        `end` checks that this process still owns the row.
        """
        while True:
            try:
                return await self._database.work(end, entry=entry)
            except Unavailable:
                if is_cancelled():
                    raise
            await asyncio.sleep(POLL_SECONDS)
