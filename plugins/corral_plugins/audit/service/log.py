"""The audit log as all others use it: `record` adds a row that commits with the change, or neither does."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

import peewee

from corral import clock
from corral.database.dialect import transaction_is_open
from corral.database.engine import Work, translate
from corral.database.leases import acquire
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
from corral_plugins.audit.service.floods import Floods
from corral_plugins.audit.settings import RECORD_IP, VERBOSE

log = logging.getLogger("corral.audit")

CHECKPOINT_ROWS = 1000
ALARM_SECONDS = 3600
COUNTED = frozenset({"audit.log.read"})
"""Actions of success that repeat as denials do: the log would fill with those who look at it."""


def _head(p: Any) -> Any:
    """The row is the lock of the chain."""
    return locked(Head.select(Head.seq, Head.hash).where(Head.id == p("id")))


_HEAD = Statement(_head)
_INSERT = Statement(lambda p: AuditRow.insert({getattr(AuditRow, name): p(name) for name in chain.COLUMNS}))
_MOVE = Statement(
    lambda p: Head.update({Head.seq: p("seq"), Head.hash: p("hash")}).where((Head.id == HEAD) & (Head.seq == p("was")))
)


def end_of_chain() -> tuple[int, str]:
    """The newest row's `seq` and `hash`; nobody else appends until this unit ends."""
    head = _HEAD.one({"id": HEAD})
    if head is None:
        raise RuntimeError("audit_head has no row")
    return head[0], head[1]


def raise_alarm(alert: SystemAlert, about: str = "") -> bool:
    """Tell admins, unless they were told the same within the hour by any process: whether they were told now."""
    told = acquire(f"audit.alarm.{alert.kind}{about}", new_id(), ALARM_SECONDS)
    if told:
        emit(alert, object=("audit_log", "audit"))
    return told


class AuditLog:
    """Implements `corral.plugin.Audit`. Counters are of this process."""

    def __init__(self, work: Work, settings: Settings, redactor: Redactor) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self._floods = Floods()
        self.rows: Counter[str] = Counter()
        self.failures, self._told_failures = 0, 0
        self.append_seconds = 0.0

    @property
    def verbose(self) -> bool:
        """Whether every request is to be recorded."""
        return self._settings.get(VERBOSE)

    def record(self, entry: AuditEntry) -> None:
        """Add a row to the current unit, which is refused with `audit_unavailable` when it cannot be written.

        Of the same denial within a minute only the first is a row; the rest is counted.
        """
        unit = current()
        repeats = entry.outcome == "denied" or entry.action in COUNTED
        if repeats and self._floods.counted(entry, unit.entry):
            return
        self._add(unit, entry)
        if repeats:
            by = unit.entry
            after_commit(lambda: self._floods.written(entry, by))

    async def write_counted(self, *, all: bool = False) -> None:
        """Write what was counted in minutes that are over."""
        for flood in self._floods.over(all=all):
            try:
                await self._work(lambda flood=flood: self._add(current(), flood.summed()), entry=flood.by)  # type: ignore[misc]  # bound
            except Problem:
                self._floods.again(flood)

    async def tell_failures(self) -> None:
        """Raise the alarm for rows that could not be written since the last time, once an hour whoever asks."""
        failures = self.failures
        if failures == self._told_failures:
            return
        count = failures - self._told_failures
        detail = f"{count} rows could not be written by one process; what they belong to was refused."
        alert = SystemAlert(
            kind="audit_write_failed", severity="critical", title="The audit log cannot be written", detail=detail
        )
        if await self._work(lambda: raise_alarm(alert), entry=Entry("audit.alarm")):
            self._told_failures = failures

    def _add(self, unit: Unit, entry: AuditEntry) -> None:
        record_ip = self._settings.get(RECORD_IP)
        columns = entries.stored(entry, unit.entry, self._redactor, record_ip=record_ip)
        unit.audit.append(lambda: self._append(unit, columns))

    def _append(self, unit: Unit, columns: dict[str, Any]) -> None:
        """At the end of the unit: lock the end of the chain, link, move the end."""
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
        if not _MOVE.run({"seq": values["seq"], "hash": values["hash"], "was": seq}):
            raise RuntimeError("the end of the audit log was moved by somebody else")
        if values["seq"] % CHECKPOINT_ROWS == 0:
            enqueue("audit.checkpoint")

    def _failed(self, error: Exception) -> None:
        """Raise what the caller gets. A lost connection, a full disk and a busy database are told by the engine."""
        if not transaction_is_open():
            raise error
        known = translate(error) if isinstance(error, (peewee.DatabaseError, peewee.InterfaceError)) else error
        if isinstance(known, Problem) and known.code in ("storage_full", "overloaded"):
            raise known
        self.failures += 1
        log.error("the audit log cannot be written", exc_info=error)
        raise Unavailable(
            "The audit log cannot be written, so nothing was changed.", code="audit_unavailable", retry_after=5
        ) from error
