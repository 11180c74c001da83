"""The logs and the usage that workers report for their runs.

The worker numbers the lines of a log. A log is limited to 5 MiB per attempt.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import NotFound
from corral_plugins.cost.api import BillableUsage, ChargedCost, Costs
from corral_plugins.tasks.models import Attempt, AttemptRow, LogLine, TaskRow
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.transitions import TaskTransitions
from corral_plugins.tasks.shapes import LogQuery, LogView
from corral_plugins.tasks.worker_protocol_shapes import (
    LogEntry,
    LogReport,
    LogsAccepted,
    UsageItem,
    UsageReport,
    UsageTotals,
)

LOG_BYTES = 5 * 1024 * 1024
TRUNCATED = "The log of this attempt has reached 5 MiB; further lines are discarded."

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
    """Appends lines to the logs of runs. Every method runs in the caller's unit of work."""

    def __init__(self, transitions: TaskTransitions) -> None:
        self._transitions = transitions

    def append(self, task_id: str, lease_id: str | None, logs: LogReport, by: Principal) -> LogsAccepted:
        """Store the log lines whose `seq` is not stored yet, and renew the lease.

        Only the attempt is locked, so that other calls for the task are not delayed.
        """
        attempt = rows.find_attempt(lease_id) if lease_id is not None else None
        if attempt is None or attempt.task_id != task_id or attempt.finished_at is not None:
            raise self._transitions.stale_call_error()
        if by.worker_id != attempt.worker_id and by.lease_id != attempt.lease_id:
            raise self._transitions.stale_call_error()
        entries = self._new_entries(attempt, logs.entries)
        size, kept = attempt.log_bytes, []
        for entry in entries:
            if size > LOG_BYTES:
                break
            size += len(entry.message.encode()) + 64
            kept.append(self._line_columns(attempt, entry, TRUNCATED if size > LOG_BYTES else entry.message))
        following = max([attempt.log_next, *(entry.seq + 1 for entry in logs.entries)])
        renewed = rows.change_attempt(
            attempt,
            lease_until=self._transitions.new_lease_expiry(),
            last_activity_at=clock.now(),
            stalled=False,
            log_bytes=size,
            log_next=following,
        )
        if not renewed:
            raise self._transitions.stale_call_error()
        if kept:
            LogLine.insert_many(kept).on_conflict_ignore().execute()
        self._transitions.workers.record_contact(attempt.worker_id)
        return LogsAccepted(accepted=len(entries), next_seq=following)

    @staticmethod
    def _new_entries(attempt: AttemptRow, entries: list[LogEntry]) -> list[LogEntry]:
        """Return the entries that are not stored yet, without duplicates, ordered by `seq`."""
        by_seq = {entry.seq: entry for entry in sorted(entries, key=lambda entry: entry.seq)}
        if not by_seq:
            return []
        span = {"task": attempt.task_id, "fence": attempt.fence, "first": min(by_seq), "last": max(by_seq)}
        known = {seq for (seq,) in _KNOWN.rows(span)} if min(by_seq) < attempt.log_next else set()
        return [entry for seq, entry in by_seq.items() if seq not in known]

    @staticmethod
    def _line_columns(attempt: AttemptRow, entry: LogEntry, message: str) -> dict[str, Any]:
        return {
            "task_id": attempt.task_id,
            "fence": attempt.fence,
            "seq": entry.seq,
            "ts": clock.from_datetime(entry.ts),
            "level": entry.level,
            "message": message,
        }


def read_log_lines(task_id: str, fence: int, query: LogQuery) -> list[LogView]:
    """Return an attempt's log lines whose `seq` is greater than `query.after`, oldest first."""
    where = (LogLine.task_id == task_id) & (LogLine.fence == fence) & (LogLine.seq > query.after)
    if isinstance(query.level, list):
        where &= LogLine.level.in_(query.level)
    found = (
        LogLine.select(LogLine.fence, LogLine.seq, LogLine.ts, LogLine.level, LogLine.message)
        .where(where)
        .order_by(LogLine.seq)
        .limit(query.limit)
    )
    return [
        LogView(fence=row[0], seq=row[1], ts=row[2], level=row[3], message=row[4]) for row in rows.fetch_tuples(found)
    ]


# -- usage


OUTSIDE = "worker"
"""The provider name that is recorded if a worker reports only usage totals, which do not name a provider."""


class UsageReports:
    """Records the token usage and the cost of runs. Every method runs in the caller's unit of work."""

    cost: Costs | None

    def record_usage(self, row: TaskRow, attempt: AttemptRow, used: UsageReport | None) -> None:
        """Add the usage from a worker's report to both the task and the attempt.

        The usage is recorded even if the attempt has ended.
        """
        changes = self.apply_report(row, attempt, used)
        if changes:
            rows.change_task(row, changes)

    def apply_report(self, row: TaskRow, attempt: AttemptRow, used: UsageReport | None) -> dict[str, Any]:
        """Record on the attempt the part of the reported usage that earlier reports did not contain.

        Return the columns to change in the task. The caller must have locked the task.
        """
        if used is None:
            return {}
        more = self._add_items(row, attempt, used) if isinstance(used, list) else self._add_totals(row, attempt, used)
        return _add_usage(row, attempt, more) if more else {}

    def _add_totals(self, row: TaskRow, attempt: AttemptRow, used: UsageTotals) -> dict[str, int]:
        before: dict[str, Any] = rows.parse_json_text(attempt.reported_usage) or {}
        totals = _usage_columns(used)
        more = {name: total - before.get(name, 0) for name, total in totals.items() if total > before.get(name, 0)}
        if not more:
            return {}
        _store_reported(attempt, {**before, **{name: totals[name] for name in more}})
        tokens = {name: more[name] for name in ("input_tokens", "output_tokens") if name in more}
        if self.cost is None or not (tokens or "cost_micro" in more):
            return more
        cost = Decimal(more["cost_micro"]) / 1_000_000 if "cost_micro" in more else None
        key = ":".join((attempt.id, *(f"{name}={total}" for name, total in sorted(totals.items()))))
        charged = self.cost.record_cost(
            BillableUsage(
                usage_key=key,
                provider=OUTSIDE,
                model="",
                operation="other",
                cost_usd=cost,
                **tokens,
                **_attribution(row, attempt),
            )
        )
        return {
            **{name: n for name, n in more.items() if name not in _PRICES},
            **_price_columns(charged, sum(tokens.values())),
        }

    def _add_items(self, row: TaskRow, attempt: AttemptRow, used: list[UsageItem]) -> dict[str, int]:
        more: Counter[str] = Counter()
        for item in used if self.cost is not None else _new_items(attempt, used):
            charged = None if self.cost is None else self.cost.record_cost(_billable_usage(item, row, attempt))
            if charged is not None and charged.repeated:
                continue
            read = (
                item.input_tokens + item.cache_read_tokens + item.cache_write_tokens
            )  # the counters do not distinguish these kinds of tokens
            more.update(calls=1, input_tokens=read, output_tokens=item.output_tokens)
            tokens = read + item.output_tokens
            more.update(
                _price_columns(charged, tokens) if charged is not None else _reported_price_columns(item, tokens)
            )
        return {name: n for name, n in more.items() if n}


_PRICES = ("cost_micro", "unpriced_tokens")


def _store_reported(attempt: AttemptRow, reported: dict[str, Any]) -> None:
    """Store on the attempt the usage that the worker has reported so far, so that a repeated report adds nothing."""
    attempt.reported_usage = rows.to_json_text(reported)
    Attempt.update(reported_usage=msgspec.Raw(attempt.reported_usage.encode())).where(
        Attempt.id == attempt.id
    ).execute()


def _new_items(attempt: AttemptRow, used: list[UsageItem]) -> list[UsageItem]:
    """Return the usage items that were not reported before. Each item is identified by its key.

    This function is used only if the `cost` plugin is not active. The attempt then stores the reported keys itself.
    """
    before: dict[str, Any] = rows.parse_json_text(attempt.reported_usage) or {}
    known = set(before.get("keys", ()))
    new = list({item.usage_key: item for item in used if item.usage_key not in known}.values())
    if new:
        _store_reported(attempt, {**before, "keys": sorted(known | {item.usage_key for item in new})})
    return new


def _billable_usage(item: UsageItem, row: TaskRow, attempt: AttemptRow) -> BillableUsage:
    given = msgspec.structs.asdict(item)
    cost = None if item.cost_usd is None else Decimal(repr(item.cost_usd))
    return BillableUsage(**{**given, "cost_usd": cost}, **_attribution(row, attempt))


def _attribution(row: TaskRow, attempt: AttemptRow) -> dict[str, Any]:
    return {
        "task_id": attempt.task_id,
        "attempt_id": attempt.id,
        "agent_id": attempt.agent_id,
        "user_id": attempt.requester_id,
        "run_id": row.workflow_run_id,
    }


def _price_columns(charged: ChargedCost, tokens: int) -> dict[str, int]:
    """Return the cost to add, or the number of tokens to add if their price is unknown, keyed by column name."""
    return {"unpriced_tokens": tokens} if charged.cost_micro_usd is None else {"cost_micro": charged.cost_micro_usd}


def _reported_price_columns(item: UsageItem, tokens: int) -> dict[str, int]:
    return {"unpriced_tokens": tokens} if item.cost_usd is None else {"cost_micro": round(item.cost_usd * 1e6)}


def add_gateway_usage(task_id: str, lease_id: str, used: UsageTotals) -> bool:
    """Record the usage of one gateway call under this lease, even if the lease has ended.

    Return whether the task has reached its cost limit.
    """
    try:
        row = rows.lock_task(task_id)
    except NotFound:
        return False
    attempt = rows.find_attempt(lease_id)
    if attempt is None or attempt.task_id != task_id:
        return False
    rows.change_task(row, _add_usage(row, attempt, {name: n for name, n in _usage_columns(used).items() if n}))
    return has_reached_cost_limit(attempt)


def has_reached_cost_limit(attempt: AttemptRow) -> bool:
    """Return whether the attempt has spent the entire amount that the task's cost limit left for it."""
    return attempt.cost_limit_micro is not None and 0 < attempt.cost_micro >= attempt.cost_limit_micro


def _usage_columns(used: UsageTotals) -> dict[str, int]:
    """Return the usage as a dictionary keyed by column name. Tokens without a price are counted as unpriced."""
    found = {"input_tokens": used.input_tokens, "output_tokens": used.output_tokens, "calls": used.calls}
    if isinstance(used.cost_usd, msgspec.UnsetType):
        return {**found, "unpriced_tokens": used.input_tokens + used.output_tokens}
    return {**found, "cost_micro": round(used.cost_usd * 1e6)}


def _add_usage(row: TaskRow, attempt: AttemptRow, more: dict[str, int]) -> dict[str, Any]:
    rows.add_usage(attempt, more)
    return {name: getattr(row, name) + n for name, n in more.items()}
