"""The audit log service for other plugins. `record` adds a row that commits together with the change it describes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

import peewee

from corral import clock
from corral.database.dialect import transaction_is_open
from corral.database.engine import Work, translate
from corral.database.leases import acquire_lease
from corral.database.statement import Statement
from corral.database.unit import Entry, Unit, after_commit, current, locked
from corral.errors import Problem, Unavailable
from corral.events.event import SystemAlert, emit
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import AuditEntry, Settings
from corral.redact.redactor import Redactor
from corral_plugins.audit.models import HEAD, AuditRow, Head
from corral_plugins.audit.service import chain, entries
from corral_plugins.audit.service.deduplication import Deduplicator
from corral_plugins.audit.settings import RECORD_IP, VERBOSE

log = logging.getLogger("corral.audit")

CHECKPOINT_ROWS = 1000
ALERT_SECONDS = 3600
DEDUPLICATED = frozenset({"audit.log.read"})
"""Successful actions that are deduplicated like denials, so that readers do not fill the log."""


def _head(p: Any) -> Any:
    """Return the query of the head row. Locking this row serializes all appends."""
    return locked(Head.select(Head.seq, Head.hash).where(Head.id == p("id")))


_HEAD = Statement(_head)
_INSERT = Statement(lambda p: AuditRow.insert({getattr(AuditRow, name): p(name) for name in chain.COLUMNS}))
_ADVANCE = Statement(
    lambda p: Head.update({Head.seq: p("seq"), Head.hash: p("hash")}).where((Head.id == HEAD) & (Head.seq == p("was")))
)


def end_of_chain() -> tuple[int, str]:
    """Return `seq` and `hash` of the newest row, and lock the chain until the unit of work ends."""
    head = _HEAD.one({"id": HEAD})
    if head is None:
        raise RuntimeError("audit_head has no row")
    return head[0], head[1]


def raise_alert(alert: SystemAlert, about: str = "") -> bool:
    """Alert admins, at most once an hour across all processes. Return whether the alert was sent."""
    is_due = acquire_lease(f"audit.alert.{alert.kind}{about}", new_id(), ALERT_SECONDS)
    if is_due:
        emit(alert, object=("audit_log", "audit"))
    return is_due


class AuditLog:
    """Implements the protocol `corral.plugin.Audit`. Its counters cover this process only."""

    def __init__(self, work: Work, settings: Settings, redactor: Redactor) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self._deduplicator = Deduplicator()
        self.rows: Counter[str] = Counter()
        self.failures, self._reported_failures = 0, 0
        self.append_seconds = 0.0

    @property
    def verbose(self) -> bool:
        """Whether every request is recorded, as the setting `audit.verbose` demands."""
        return self._settings.get(VERBOSE)

    def record(self, entry: AuditEntry) -> None:
        """Add a row to the current unit of work. Raises `audit_unavailable` if the row cannot be written.

        Of equal denials within a minute, only the first becomes a row; the others are counted.
        """
        unit = current()
        repeats = entry.outcome == "denied" or entry.action in DEDUPLICATED
        if repeats and self._deduplicator.is_counted(entry, unit.entry):
            return
        self._add(unit, entry)
        if repeats:
            by = unit.entry
            after_commit(lambda: self._deduplicator.started(entry, by))

    async def write_repetitions(self, *, all: bool = False) -> None:
        """Write one row per entry with the number of repetitions whose minute is over, or all of them."""
        for repeated in self._deduplicator.take_ended(all=all):
            try:
                await self._work(lambda repeated=repeated: self._add(current(), repeated.summary()), entry=repeated.by)  # type: ignore[misc]  # bound in each iteration
            except Problem:
                self._deduplicator.put_back(repeated)

    async def report_failures(self) -> None:
        """Alert admins about rows that could not be written since the last alert, at most once an hour."""
        failures = self.failures
        if failures == self._reported_failures:
            return
        count = failures - self._reported_failures
        detail = f"One process could not write {count} rows; the operations they describe were refused."
        alert = SystemAlert(
            kind="audit_write_failed", severity="critical", title="The audit log cannot be written", detail=detail
        )
        if await self._work(lambda: raise_alert(alert), entry=Entry("audit.alert")):
            self._reported_failures = failures

    def _add(self, unit: Unit, entry: AuditEntry) -> None:
        record_ip = self._settings.get(RECORD_IP)
        columns = entries.stored(entry, unit.entry, self._redactor, record_ip=record_ip)
        unit.audit.append(lambda: self._append(unit, columns))

    def _append(self, unit: Unit, columns: dict[str, Any]) -> None:
        """Lock the chain, link the row to the previous one and advance the head.

        Runs at the end of the unit of work.
        """
        began = time.perf_counter()
        try:
            self._link(columns)
        except Problem:
            raise
        except Exception as error:
            self._failed(error)
            raise
        took = time.perf_counter() - began

        def count() -> None:
            self.rows[columns["outcome"]] += 1
            self.append_seconds += took

        unit.after.append(count)

    @staticmethod
    def _link(columns: dict[str, Any]) -> None:
        seq, prev_hash = end_of_chain()
        values = {**columns, "seq": seq + 1, "id": new_id(), "ts": clock.now(), "prev_hash": prev_hash}
        values["hash"] = chain.unhashed([values[name] for name in chain.COLUMNS[:-1]]).digest()
        _INSERT.run(values)
        if not _ADVANCE.run({"seq": values["seq"], "hash": values["hash"], "was": seq}):
            raise RuntimeError("another writer advanced the head of the audit log")
        if values["seq"] % CHECKPOINT_ROWS == 0:
            enqueue("audit.checkpoint")

    def _failed(self, error: Exception) -> None:
        """Raise the error that the caller receives when a row cannot be written.

        Lost connections, full disks and busy databases keep the error of the database engine.
        """
        if not transaction_is_open():
            raise error
        known = translate(error) if isinstance(error, (peewee.DatabaseError, peewee.InterfaceError)) else error
        if isinstance(known, Problem) and known.code in ("storage_full", "overloaded"):
            raise known
        self.failures += 1
        log.error("cannot write to the audit log", exc_info=error)
        raise Unavailable(
            "The audit log cannot be written, so nothing was changed; try again later.",
            code="audit_unavailable",
            retry_after=5,
        ) from error
