"""Runs batches, which retry many dead letters at a limited rate. A batch continues after a restart."""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
from peewee import SQL, fn

from corral import clock
from corral.auth.principal import SYSTEM_PRINCIPAL, Principal
from corral.database.dialect import savepoint
from corral.database.engine import translate_error
from corral.database.unit import locked
from corral.errors import Conflict, NotFound, Problem, Unavailable
from corral.ids import new_id
from corral.jobs.job import JobRow, enqueue
from corral.plugin import Audit, AuditEntry, Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.dead_letter import settings as declared
from corral_plugins.dead_letter.models import Batch, DeadLetter
from corral_plugins.dead_letter.service.letters import DeadLetterQueue, filter_conditions, is_open
from corral_plugins.dead_letter.shapes import BatchView, LetterFilter, RetryAll, RetryDeadLetter, SkippedLetter
from corral_plugins.tasks.api import Tasks

log = logging.getLogger("corral.dead_letter")

JOB = "dead_letter.batch"
MAX_FAILURES = 20
"""The number of consecutive tasks that must fail again for a batch to be cancelled."""
RECENT = 200
MAX_SKIPPED = 1000
MAX_LETTERS = 10
"""The maximum number of letters that one step retries. The limit keeps its transaction short."""
MAX_DELAY_SECONDS = 2.0
"""The longest delay that a batch makes up for, for example after a restart.

The limit prevents a delayed batch from retrying many letters at once.
"""
SWITCH_SECONDS = 1.0


class DeadLetterBatches:
    """Starts, runs and cancels batches. Every method runs in the caller's unit of work."""

    audit: Audit | None
    switch: KillSwitch | None

    def __init__(self, settings: Settings, queue: DeadLetterQueue, tasks: Tasks) -> None:
        self._settings, self._queue, self._tasks = settings, queue, tasks

    def start(self, asked: RetryAll, *, by: Principal) -> BatchView:
        """Start a batch that retries the dead letters that are open now and match the filter.

        Raise `Conflict` if another batch is running.
        """
        now, batch_id = clock.now(), new_id()
        matched = (
            DeadLetter.select(DeadLetter.id).where(is_open(), *filter_conditions(asked.filter)).limit(asked.max).count()
        )
        Batch.insert(
            id=batch_id,
            filter=msgspec.to_builtins(asked.filter),
            rate=asked.rate_per_second or self._settings.get(declared.RETRY_RATE),
            created_by=by.user_id,
            started_at=now,
            next_at=now,
            matched=matched,
        ).on_conflict_ignore().execute()
        row: Batch | None = Batch.get_or_none(Batch.id == batch_id)
        if row is None:
            running = Batch.select(Batch.id).where(SQL("status = 'running'")).first()
            raise Conflict(
                "Another batch of retries is running; wait until that batch has ended, or cancel it.",
                code="batch_in_progress",
                existing_id=None if running is None else running.id,
            )
        enqueue(JOB, batch_id=batch_id)
        self._record_audit("start", row)
        return _view(row)

    def get(self, batch_id: str) -> BatchView:
        """Return a batch. Raise `NotFound` if it does not exist."""
        row: Batch | None = Batch.get_or_none(Batch.id == batch_id)
        if row is None:
            raise NotFound("There is no batch with this id.")
        return _view(row)

    def cancel(self, batch_id: str) -> BatchView:
        """Cancel a running batch. Tasks that it has already retried stay queued.

        Raise `NotFound` if the batch does not exist, and `Conflict` if it has already ended.
        """
        self.get(batch_id)
        changes = {"status": "cancelled", "reason": "person", "finished_at": clock.now()}
        if not Batch.update(changes).where((Batch.id == batch_id) & (Batch.status == "running")).execute():
            raise Conflict("The batch has already ended.", current_status=self.get(batch_id).status)
        self._record_audit("cancel", Batch.get_by_id(batch_id))
        return self.get(batch_id)

    def end_abandoned(self) -> None:
        """Cancel the running batch if its job has failed too often, so that another batch can start.

        A running batch always has a job, because each step enqueues the next step in its own transaction. If there is
        no job, the last job has failed for good.
        """
        jobs = JobRow.select(JobRow.id).where((JobRow.name == JOB) & JobRow.state.in_(("queued", "running")))
        changes = {"status": "cancelled", "reason": "error", "finished_at": clock.now()}
        if Batch.update(changes).where((Batch.status == "running") & ~fn.EXISTS(jobs)).execute():
            log.error("a batch of retries was cancelled, because its job failed too often; see the log of the job")

    # -- running

    def run_step(self, batch_id: str) -> None:
        """Retry as many dead letters of a batch as its rate allows now, and enqueue the next step.

        The batch's position is stored in the same transaction as the retries, so no letter is lost or retried twice if
        the process is killed.
        """
        row: Batch | None = locked(Batch.select().where(Batch.id == batch_id)).first()
        if row is None or row.status != "running" or row.next_at > clock.now():
            return
        if self.switch is not None and self.switch.state().engaged:
            self._continue(row, next_at=clock.now(SWITCH_SECONDS))
        elif self._is_failing(batch_id):
            self._end(row, "cancelled", reason="failing")
        else:
            self._retry_due(row)

    def _retry_due(self, row: Batch) -> None:
        now = clock.time_s()
        since = max(clock.parse_instant(row.next_at), now - MAX_DELAY_SECONDS)
        wanted = min(math.floor((now - since) * row.rate) + 1, row.matched - row.handled, MAX_LETTERS)
        letters = self._next_letters(row, wanted) if wanted > 0 else []
        if not letters:
            self._end(row, "done")
            return
        for letter in letters:
            skipped = self._retry(letter, row.id)
            row.requeued += skipped is None
            if skipped is not None and len(row.skipped) < MAX_SKIPPED:
                row.skipped = [*row.skipped, {"id": letter.id, "reason": skipped}]
        row.handled += len(letters)
        row.seen_at, row.seen_id = letters[-1].created_at, letters[-1].id
        self._continue(row, next_at=clock.format_instant(since + len(letters) / row.rate))

    def _next_letters(self, row: Batch, limit: int) -> list[DeadLetter]:
        """Return the next dead letters of a batch.

        A letter belongs to the batch if it was open when the batch started and matches the batch's filter.
        """
        after = (DeadLetter.created_at > row.seen_at) | (
            (DeadLetter.created_at == row.seen_at) & (DeadLetter.id > row.seen_id)
        )
        was_open = is_open() | (DeadLetter.resolved_at > row.started_at)
        members = (DeadLetter.created_at >= row.seen_at) & (DeadLetter.created_at <= row.started_at)
        chosen = filter_conditions(msgspec.convert(row.filter, LetterFilter))
        found = DeadLetter.select().where(members & after & was_open, *chosen)
        return list(found.order_by(DeadLetter.created_at, DeadLetter.id).limit(limit))

    def _retry(self, letter: DeadLetter, batch_id: str) -> str | None:
        """Retry the task of a dead letter. Return None on success, otherwise the reason why the letter was skipped."""
        try:
            with savepoint():
                self._queue.retry_letter(letter.id, RetryDeadLetter(), by=SYSTEM_PRINCIPAL, batch_id=batch_id)
        except Problem as problem:
            return problem.code if problem.code == "already_retried" else problem.detail
        except Exception as error:
            if isinstance(translate_error(error), Unavailable):  # the database: the step runs again
                raise
            log.exception("a dead letter could not be retried", extra={"letter": letter.id, "task": letter.task_id})
            return "The retry failed unexpectedly; the log of the server has the reason."
        return None

    def _is_failing(self, batch_id: str) -> bool:
        """Return whether the batch's 20 most recently ended tasks all failed again."""
        newest: Any = DeadLetter.select(DeadLetter.task_id).where(DeadLetter.batch_id == batch_id)
        task_ids = [row.task_id for row in newest.order_by(DeadLetter.resolved_at.desc()).limit(RECENT)]
        if len(task_ids) < MAX_FAILURES:
            return False
        statuses = self._tasks.statuses(task_ids).values()
        ended = sorted((at, status) for status, at in statuses if at is not None)[-MAX_FAILURES:]
        return len(ended) == MAX_FAILURES and all(status == "failed" for _, status in ended)

    @staticmethod
    def _continue(row: Batch, *, next_at: str) -> None:
        row.next_at = next_at
        row.save()
        enqueue(JOB, delay_seconds=max(0.0, clock.parse_instant(next_at) - clock.time_s()) + 0.001, batch_id=row.id)

    @staticmethod
    def _end(row: Batch, status: str, *, reason: str | None = None) -> None:
        row.status, row.reason, row.finished_at = status, reason, clock.now()
        row.save()

    def _record_audit(self, verb: str, row: Batch) -> None:
        if self.audit is not None:
            details = {"matched": row.matched, "requeued": row.requeued, "filter": row.filter}
            entry = AuditEntry(
                action=f"dead_letter.batch.{verb}", object_type="dead_letter_batch", object_id=row.id, details=details
            )
            self.audit.record(entry)


def _view(row: Batch) -> BatchView:
    return BatchView(
        id=row.id,
        status=row.status,  # type: ignore[arg-type]  # one of the statuses that this module sets
        reason=row.reason,  # type: ignore[arg-type]  # likewise
        matched=row.matched,
        requeued=row.requeued,
        skipped=msgspec.convert(row.skipped, list[SkippedLetter]),
        rate_per_second=row.rate,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
