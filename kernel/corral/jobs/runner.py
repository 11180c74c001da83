"""The job runner of a process. It claims each job and schedule with a conditional update before running it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import peewee

from corral import clock
from corral.background_tasks import is_cancelled
from corral.database.engine import Database
from corral.database.unit import SYSTEM_CONTEXT, UnitContext, locked
from corral.errors import ExpectedFailure, Unavailable
from corral.events.live_feed import wait_and_clear
from corral.ids import new_id
from corral.jobs.job import Job, JobRow, Schedule, ScheduleRow, TimeOfDay
from corral.jobs.shared_queue import SharedJobQueue

log = logging.getLogger("corral.jobs")
T = TypeVar("T")

POLL_SECONDS = 1.0
BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 2.0, 600.0
SCHEDULE_LEASE_SECONDS = 15.0  # renewed while the schedule runs; a schedule whose process was killed is due after it
SKEW_SECONDS = 60.0  # largest clock difference; a due time further ahead was written before a clock was set back
CLAIM = UnitContext("schedules", durable=False)  # after a loss of power, they run again
QUEUE_GRACE_SECONDS = 2.0  # a job that the shared queue has not delivered by then is claimed from the table


class LeaseLost(ExpectedFailure):
    """Raised when another process has claimed the job. The unit of work of this process is rolled back."""


class JobRunner:
    """Runs the jobs and schedules of one process. `queue` is the shared job queue, or None if there is none."""

    def __init__(self, database: Database, redact: Callable[[str], str]) -> None:
        self._database = database
        self._redact = redact  # error messages are stored, so they are redacted first
        self._jobs: dict[str, Job] = {}
        self.schedules: dict[str, Schedule] = {}
        self._in_service: dict[str, Callable[[], bool]] = {}
        self.queue: SharedJobQueue | None = None
        self._concurrency, self._taken_slots, self._slot_freed = 0, 0, asyncio.Event()
        self._wake_up, self.started = asyncio.Event(), asyncio.Event()
        self._draining = False
        self._running: set[asyncio.Task[Any]] = set()
        self._next_checks: dict[str, float] = {}  # of the schedules, in epoch seconds

    def add(self, jobs: Sequence[Job], schedules: Sequence[Schedule], in_service: Callable[[], bool]) -> None:
        """Add jobs and schedules. They wait while their plugin is out of service (`in_service` returns false)."""
        self._jobs |= {job.name: job for job in jobs}
        self.schedules |= {schedule.name: schedule for schedule in schedules}
        self._in_service |= dict.fromkeys([*(job.name for job in jobs), *(each.name for each in schedules)], in_service)

    def is_in_service(self, name: str) -> bool:
        """Return whether the plugin of a job or schedule is in service."""
        return self._in_service[name]()

    def set_concurrency(self, jobs: int) -> None:
        """Change the number of jobs that run at the same time. Running jobs above the new limit finish normally."""
        self._concurrency = jobs
        self._slot_freed.set()
        self._wake_up.set()

    def announce(self, ids: Sequence[str]) -> None:
        """Announce new jobs that are due. `ids` are the ids of their rows."""
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
        if claimed is not None:
            self._create_task(self._run_job(claimed)).add_done_callback(self._job_ended)
        return claimed is not None

    async def run(self) -> None:
        """Run jobs and schedules until cancelled. The kernel runs this method in a supervised task."""
        self.started.set()
        try:
            while True:
                try:
                    wait = await self._tick()
                except Exception as error:  # must not end the running jobs
                    self._log_failure(logging.ERROR, "the job runner cannot read its tables", error)
                    wait = POLL_SECONDS
                await wait_and_clear(self._wake_up, wait)
        finally:
            for task in tuple(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def drain(self, seconds: float) -> None:
        """Start no further jobs, and wait up to `seconds` for the running jobs to finish."""
        self._draining = True
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _tick(self) -> float:
        """Start all due jobs and schedules. Return the number of seconds until the tables must be read again."""
        now = clock.time_s()
        if self._draining:
            return POLL_SECONDS
        checks = {name: self._next_checks.get(name, now) for name in self.schedules if self.is_in_service(name)}
        if names := [name for name, at in checks.items() if not now < at <= self.schedules[name].next_after(now)]:
            for row, is_claimed in await self._database.work(lambda: self.claim_schedules(names), entry=CLAIM):
                if is_claimed:
                    self.start_schedule(row)
                following = self.schedules[row.name].next_after(clock.time_s())
                self._next_checks[row.name] = min(clock.parse_instant(row.next_at), following)
        while self._taken_slots < self._concurrency and await self.start_job():
            continue
        due = min((self._next_checks[name] for name in checks), default=math.inf)
        return min(max(0.02, due - clock.time_s()), POLL_SECONDS)  # also when the clock was set back during this tick

    def _create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    # Schedules

    def claim_schedules(self, names: Sequence[str], *, due: bool = False) -> list[tuple[ScheduleRow, bool]]:
        """Claim the named schedules that are due and not running.

        If `due` is true, all of them count as due. Return the row of each named schedule, and whether this call claimed
        the schedule. Runs in the caller's unit of work.
        """
        now, lease, is_named = clock.time_s(), new_id(), ScheduleRow.name.in_(names)
        following = {name: self.schedules[name].next_after(now) for name in names}
        timed = {name for name in names if isinstance(self.schedules[name].every, TimeOfDay)}
        new = [{"name": name, "next_at": clock.LAST if name in timed else clock.FIRST} for name in names]
        ScheduleRow.insert_many(new).on_conflict_ignore().execute()
        rows = ScheduleRow.select().where(is_named).order_by(ScheduleRow.name)
        for row in list(locked(rows.clone())):  # locked in this order, so that no deadlock arises
            at, ahead = clock.parse_instant(row.next_at), clock.parse_instant(row.next_at) - following[row.name]
            # The row is new, the clock was set back, the interval became shorter, or the time of day is another one.
            if at > now and (ahead > SKEW_SECONDS or (ahead < 0 and row.lease is None and row.name in timed)):
                row.next_at = clock.format_instant(following[row.name])
                row.save(only=[ScheduleRow.next_at])
        is_due = ScheduleRow.next_at <= clock.format_instant(now)
        which = is_named & (is_due | ScheduleRow.lease.is_null() if due else is_due)
        claimed = {"next_at": clock.now(SCHEDULE_LEASE_SECONDS), "lease": lease, "last_at": clock.now()}
        ScheduleRow.update(claimed).where(which).execute()
        return [(row, row.lease == lease) for row in rows]

    def start_schedule(self, row: ScheduleRow) -> asyncio.Task[Exception | None]:
        """Start a claimed schedule. The result of the returned asyncio task is the error of the run, or None."""
        return self._create_task(self._run_schedule(row))

    async def _run_schedule(self, row: ScheduleRow) -> Exception | None:
        schedule, began = self.schedules[row.name], clock.parse_instant(row.last_at)
        mine = (ScheduleRow.name == row.name) & (ScheduleRow.lease == row.lease)  # one lease for all of a claim

        def finish(error: str | None = None) -> None:
            following = clock.format_instant(max(schedule.next_after(began), clock.time_s()))
            if not ScheduleRow.update(next_at=following, lease=None, error=error).where(mine).execute():
                raise LeaseLost("the lease ended during the run")

        renewal = asyncio.create_task(self._renew_lease(mine))
        try:
            await self._call(schedule, {}, finish)
        except Exception as failure:
            error = self._log_failure(logging.ERROR, "schedule failed", failure, schedule=row.name)
            with contextlib.suppress(LeaseLost):
                await self._write(lambda: finish(error))
            return failure
        finally:
            renewal.cancel()
        return None

    async def _renew_lease(self, mine: peewee.Expression) -> None:
        """Renew the lease of a running schedule until cancelled."""
        while True:
            await asyncio.sleep(SCHEDULE_LEASE_SECONDS / 3)
            until = {"next_at": clock.now(SCHEDULE_LEASE_SECONDS)}
            await self._write(ScheduleRow.update(until).where(mine).execute)

    # Jobs

    def _job_ended(self, task: asyncio.Task[None]) -> None:
        self._release_slot()
        self._wake_up.set()

    def _release_slot(self) -> None:
        self._taken_slots -= 1
        self._slot_freed.set()

    async def _claim_job(self, only: str | None = None) -> JobRow | None:
        """Claim a due job and return its row with the lease of this process. Return None if no job was claimed."""
        row = await self._database.read(lambda: self._due_job(only), SYSTEM_CONTEXT)
        return row if row is not None and await self._database.work(lambda: self._lease_job(row)) else None

    def _due_job(self, only: str | None) -> JobRow | None:
        """Return the first due job, or None. With `only`, return the job with this id if it is due.

        A job that was announced to the shared queue is skipped for a grace period, because the process that receives
        the announcement should run it.
        """
        names = [name for name in self._jobs if self.is_in_service(name)]
        where = JobRow.state.in_(("queued", "running")) & (JobRow.run_at <= clock.now()) & JobRow.name.in_(names)
        if only is not None:
            where &= JobRow.id == only
        elif self.queue is not None:
            announced = (JobRow.attempts == 0) & (JobRow.run_at <= JobRow.created_at)
            where &= ~announced | (JobRow.run_at <= clock.now(-QUEUE_GRACE_SECONDS))
        row: JobRow | None = JobRow.select().where(where).order_by(JobRow.run_at).first()
        return row

    def _lease_job(self, row: JobRow) -> bool:
        """Claim the job by setting a lease in its row, and return whether this process may run the job.

        The claim fails if another process has already claimed the job. For a running job, `run_at` is the end of its
        lease; after that time, the job may be claimed again. If the process was killed in every attempt, the job is
        marked as failed instead, so that it cannot terminate more processes.
        """
        job, row.lease = self._jobs[row.name], new_id()
        changes: dict[str, Any]
        if is_given_up := row.state == "running" and row.attempts >= job.max_attempts:
            error = f"The process that ran the job ended during each of {row.attempts} attempts."
            changes = {"state": "failed", "lease": None, "finished_at": clock.now(), "error": error}
        else:
            run_until, attempts = clock.now(job.lease_seconds), row.attempts + 1
            changes = {"state": "running", "lease": row.lease, "attempts": attempts, "run_at": run_until}
        unchanged = (JobRow.id == row.id) & (JobRow.attempts == row.attempts) & (JobRow.state == row.state)
        return bool(JobRow.update(changes).where(unchanged).execute()) and not is_given_up

    async def _run_job(self, row: JobRow) -> None:
        """Run a claimed job and record its result.

        A job that is interrupted because its process stops is queued again, and the attempt is not counted. If a
        `CancelledError` ends the job for any other reason, the job has failed.
        """
        job = self._jobs[row.name]

        def end(**changes: Any) -> None:
            mine = (JobRow.id == row.id) & (JobRow.lease == row.lease)
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
        told = {"job": job.name, "attempt": row.attempts + 1, "max_attempts": job.max_attempts}
        error = self._log_failure(logging.WARNING, "job failed", failure, **told)
        if row.attempts + 1 >= job.max_attempts:
            return {"state": "failed", "finished_at": clock.now(), "error": error}
        delay = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2**row.attempts)
        return {"state": "queued", "run_at": clock.now(delay), "error": error}

    def _log_failure(self, level: int, message: str, failure: BaseException, **told: Any) -> str:
        """Log a failure with the fields in `told`. Return the redacted text of the error.

        An expected failure is logged without a traceback.
        """
        error = self._redact(f"{type(failure).__name__}: {failure}")[:1000]
        traceback = None if isinstance(failure, ExpectedFailure) else failure
        log.log(level, message, extra={**told, "error": error}, exc_info=traceback)
        return error

    async def _call(self, item: Job | Schedule, arguments: Mapping[str, Any], finish: Callable[[], None]) -> None:
        """Call the function of a job or schedule.

        `finish` is called afterwards to record the success. If the function is a `def` function, `finish` runs in the
        same unit of work, so that both take effect or neither does.
        """
        entry = UnitContext(f"job {item.name}")
        if inspect.iscoroutinefunction(item.run):
            await item.run(**arguments)
            await asyncio.sleep(0)  # schedules that start together and find nothing to do end together, in one COMMIT
            await self._write(finish, entry if isinstance(item, Job) else msgspec.structs.replace(entry, durable=False))
        else:

            def both() -> None:
                item.run(**arguments)
                finish()

            await self._database.work(both, entry=entry)

    async def _write(self, end: Callable[[], None], entry: UnitContext = SYSTEM_CONTEXT) -> None:
        """Record a result by running `end` as a unit of work. Retry while the database is unavailable.

        `end` must check that this process still holds the lease in the row of the job or schedule.
        """
        while True:
            try:
                return await self._database.work(end, entry=entry)
            except Unavailable:
                if is_cancelled():
                    raise
            await asyncio.sleep(POLL_SECONDS)
