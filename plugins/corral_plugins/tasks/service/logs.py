"""Logs of attempts. The worker numbers the lines. The limit is 5 MiB per attempt."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral_plugins.tasks.models import AttemptRow, LogLine
from corral_plugins.tasks.reports import LogEntry, Logs, LogsTaken
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.runs import lost
from corral_plugins.tasks.service.transitions import Transitions
from corral_plugins.tasks.shapes import LogQuery, LogView

LOG_BYTES = 5 * 1024 * 1024
TRUNCATED = "The log of this attempt has reached 5 MiB; what follows is not kept."

_KNOWN = Statement(
    lambda p: (
        LogLine.select(LogLine.seq)
        .where(
            (LogLine.task_id == p("task"))
            & (LogLine.fence == p("fence"))
            & (LogLine.seq >= p("first"))
            & (LogLine.seq <= p("last"))
        )
        .tuples()
    )
)


class TaskLogs:
    """Appends lines to logs. Runs in the caller's unit of work."""

    def __init__(self, transitions: Transitions) -> None:
        self._transitions = transitions

    def append(self, task_id: str, lease_id: str | None, logs: Logs, by: Principal) -> LogsTaken:
        """Store the lines with a new `seq`, and renew the lease.

        Only the attempt is locked, so that other calls for the task are not delayed.
        """
        attempt = rows.of_lease(lease_id) if lease_id is not None else None
        if attempt is None or attempt.task_id != task_id or attempt.finished_at is not None:
            raise lost()
        if by.worker_id != attempt.worker_id and by.lease_id != attempt.lease_id:
            raise lost()
        entries = self._new(attempt, logs.entries)
        size, kept = attempt.log_bytes, []
        for entry in entries:
            if size > LOG_BYTES:
                break
            size += len(entry.message.encode()) + 64
            kept.append(self._line(attempt, entry, TRUNCATED if size > LOG_BYTES else entry.message))
        following = max([attempt.log_next, *(entry.seq + 1 for entry in logs.entries)])
        renewed = rows.change_attempt(
            attempt,
            lease_until=self._transitions.lease_until(),
            last_activity_at=clock.now(),
            stalled=False,
            log_bytes=size,
            log_next=following,
        )
        if not renewed:
            raise lost()
        if kept:
            LogLine.insert_many(kept).on_conflict_ignore().execute()
        self._transitions.workers.alive(attempt.worker_id)
        return LogsTaken(accepted=len(entries), next_seq=following)

    @staticmethod
    def _new(attempt: AttemptRow, entries: list[LogEntry]) -> list[LogEntry]:
        """Return the entries that are not stored yet, without duplicates, ordered by `seq`."""
        by_seq = {entry.seq: entry for entry in sorted(entries, key=lambda entry: entry.seq)}
        if not by_seq:
            return []
        span = {"task": attempt.task_id, "fence": attempt.fence, "first": min(by_seq), "last": max(by_seq)}
        known = {seq for (seq,) in _KNOWN.rows(span)} if min(by_seq) < attempt.log_next else set()
        return [entry for seq, entry in by_seq.items() if seq not in known]

    @staticmethod
    def _line(attempt: AttemptRow, entry: LogEntry, message: str) -> dict[str, Any]:
        return {
            "task_id": attempt.task_id,
            "fence": attempt.fence,
            "seq": entry.seq,
            "ts": clock.from_datetime(entry.ts),
            "level": entry.level,
            "message": message,
        }


def lines(task_id: str, fence: int, query: LogQuery) -> list[LogView]:
    """Return the lines of an attempt after `query.after`, oldest first."""
    where = (LogLine.task_id == task_id) & (LogLine.fence == fence) & (LogLine.seq > query.after)
    if isinstance(query.level, list):
        where &= LogLine.level.in_(query.level)
    found = (
        LogLine.select(LogLine.fence, LogLine.seq, LogLine.ts, LogLine.level, LogLine.message)
        .where(where)
        .order_by(LogLine.seq)
        .limit(query.limit)
    )
    return [LogView(fence=row[0], seq=row[1], ts=row[2], level=row[3], message=row[4]) for row in rows.values(found)]
