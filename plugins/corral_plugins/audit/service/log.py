"""The audit log service for other plugins. `record` adds a row that is committed together with the audited change.

Entries are redacted, limited in length and encoded as canonical JSON. If the same denied action is repeated within a
minute, only the first denial gets its own row. A later row contains the number of repetitions.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.engine import Work, translate_error
from corral.database.leases import acquire_lease
from corral.database.statement import Statement
from corral.database.unit import Unit, UnitContext, after_commit, current, locked
from corral.errors import Problem, Unavailable
from corral.events.event import SystemAlert, emit
from corral.http.routes import Route
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.metrics.histogram import Histogram
from corral.plugin import AuditEntry, Settings
from corral.redact.redactor import Redactor
from corral_plugins.audit.models import HEAD, AuditRow, ChainHead
from corral_plugins.audit.service import chain
from corral_plugins.audit.settings import RECORD_IP, VERBOSE

# -- entries


MAX_BYTES = 16 * 1024
"""The maximum size of `changes` and of `details`, in bytes. Larger values are dropped; only their hash is kept."""

LENGTHS = {
    "actor_type": 20,
    "actor_id": 80,
    "on_behalf_of": 80,
    "session_id": 80,
    "key_id": 80,
    "ip": 45,
    "user_agent": 300,
    "action": 120,
    "object_type": 60,
    "object_id": 200,
    "object_name": 300,
    "code": 80,
    "request_id": 64,
}
USER_SUPPLIED = ("user_agent", "object_id", "object_name")
"""Columns with user-supplied text, which may contain credentials."""


def entry_columns(entry: AuditEntry, by: UnitContext, redactor: Redactor, *, record_ip: bool) -> dict[str, Any]:
    """Return the columns of an audit row, except those that depend on its position in the hash chain."""
    actor = by.actor
    texts: dict[str, Any] = {
        "actor_type": actor.type,
        "actor_id": actor.id,
        "on_behalf_of": actor.on_behalf_of,
        "session_id": actor.session_id,
        "key_id": actor.key_id,
        "ip": by.client_ip if record_ip else None,
        "user_agent": by.user_agent if record_ip else None,
        "action": entry.action,
        "object_type": entry.object_type,
        "object_id": entry.object_id,
        "object_name": entry.object_name,
        "code": entry.code,
        "request_id": by.request_id,
    }
    for name in USER_SUPPLIED:
        if texts[name]:
            texts[name] = redactor.redact(texts[name])
    columns = {name: _truncate_text(text, LENGTHS[name]) for name, text in texts.items()}
    changes, details = (
        _encode_changes(entry.changes, redactor),
        _canonical_json(redactor.redact_json(_to_builtins(entry.details))),
    )
    sha256 = None
    if len(changes) > MAX_BYTES or len(details) > MAX_BYTES:
        sha256 = hashlib.sha256(b"[" + changes + b"," + details + b"]").hexdigest()
        changes = changes if len(changes) <= MAX_BYTES else b"[]"
        details = details if len(details) <= MAX_BYTES else b"{}"
    return {
        **columns,
        "outcome": entry.outcome,
        "changes": changes.decode(),
        "details": details.decode(),
        "sha256": sha256,
    }


def _encode_changes(changes: Mapping[str, tuple[Any, Any]], redactor: Redactor) -> bytes:
    fields = [
        {"field": name, "from": _to_builtins(before), "to": _to_builtins(after)}
        for name, (before, after) in changes.items()
    ]
    return _canonical_json(redactor.redact_json(fields))


def _to_builtins(value: Any) -> Any:
    """Convert a value to JSON types. Structs become objects; keys and values of unknown types become strings."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)


def _canonical_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError:  # unchecked text can contain a lone surrogate
        return msgspec.json.encode(_without_surrogates(value), order="sorted")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def _truncate_text(text: str | None, length: int) -> str | None:
    """Truncate a string and replace characters that a database cannot store.

    An empty string becomes None, because a CSV export cannot distinguish an empty string from None.
    """
    return text.encode("utf-8", "replace").decode().replace("\0", "�")[:length] if text else None


# -- deduplication


SECONDS = 60
MAX_KEYS = 10_000


class RepeatedEntry(msgspec.Struct):
    """A repeated audit entry, with the number of repetitions since it was first written."""

    entry: AuditEntry
    by: UnitContext
    since: str
    until: float
    count: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether the one-minute counting period has ended."""
        return self.until <= clock.time_s()

    def summary_entry(self) -> AuditEntry:
        """Return a copy of the entry, with the number of repetitions and the start time of the count in its details."""
        details = {**self.entry.details, "count": self.count, "since": self.since}
        return msgspec.structs.replace(self.entry, details=details)


class Deduplicator:
    """Counts repeated audit entries in memory.

    A crash loses at most one minute of counts, but never the first of several identical entries.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, RepeatedEntry] = {}

    def is_repetition(self, entry: AuditEntry, by: UnitContext) -> bool:
        """Return whether the entry is a repetition.

        An entry is a repetition if an identical entry was written less than a minute ago, or if the number of earlier
        repetitions has not been written yet.
        """
        repeated = self._by_key.get(_deduplication_key(entry, by))
        return repeated is not None and (not repeated.has_ended or repeated.count > 0)

    def count(self, entry: AuditEntry, by: UnitContext) -> None:
        """Count a repetition. Runs on the event loop.

        If the counting period has ended since `is_repetition` was called, start a new one.
        """
        self.start_counting(entry, by)
        if (repeated := self._by_key.get(_deduplication_key(entry, by))) is not None:
            repeated.count += 1

    def start_counting(self, entry: AuditEntry, by: UnitContext) -> None:
        """Start counting repetitions of a committed entry. Runs on the event loop."""
        key = _deduplication_key(entry, by)
        repeated = self._by_key.get(key)
        if repeated is None and len(self._by_key) >= MAX_KEYS:  # beyond the limit, each entry is written as its own row
            return
        if repeated is None or (repeated.has_ended and not repeated.count):
            until = clock.time_s() + SECONDS
            self._by_key[key] = RepeatedEntry(entry=entry, by=by, since=clock.now(), until=until)

    def take_ended(self, *, all: bool = False) -> list[RepeatedEntry]:
        """Remove and return the repeated entries whose one-minute counting period has ended, or all if `all` is true.

        Runs on the event loop.
        """
        ended = [key for key, repeated in self._by_key.items() if all or repeated.has_ended]
        return [repeated for repeated in [self._by_key.pop(key) for key in ended] if repeated.count]

    def put_back(self, repeated: RepeatedEntry) -> None:
        """Put back a repeated entry that could not be written, so that it is written later. Runs on the event loop."""
        newer = self._by_key.setdefault(_deduplication_key(repeated.entry, repeated.by), repeated)
        if newer is not repeated:
            newer.count, newer.since = newer.count + repeated.count, repeated.since


def _deduplication_key(entry: AuditEntry, by: UnitContext) -> Hashable:
    who = (by.actor.type, by.actor.id or by.client_ip)  # anonymous callers are distinguished by address
    return (*who, entry.action, entry.object_type, entry.object_id, entry.code)


# -- the log


log = logging.getLogger("corral.audit")

CHECKPOINT_ROWS = 1000
ALERT_SECONDS = 3600
DEDUPLICATED = frozenset({"audit.log.read"})
"""Actions that are deduplicated even if they succeed, so that frequent reading does not fill the log."""


def _head_query(p: Any) -> Any:
    """Return the query that selects the only row in the `audit_head` table. Locking this row serialises all appends."""
    return locked(ChainHead.select(ChainHead.seq, ChainHead.hash).where(ChainHead.id == p("id")))


_HEAD = Statement(_head_query)
_INSERT = Statement(lambda p: AuditRow.insert({getattr(AuditRow, name): p(name) for name in chain.COLUMNS}))
_ADVANCE = Statement(
    lambda p: ChainHead.update({ChainHead.seq: p("seq"), ChainHead.hash: p("hash")}).where(
        (ChainHead.id == HEAD) & (ChainHead.seq == p("was"))
    )
)


def lock_chain_head() -> tuple[int, str]:
    """Lock the head of the chain until the unit of work ends. Return the `seq` and `hash` of the newest row.

    Raise `RuntimeError` if the table `audit_head` is empty, because the database is damaged.
    """
    head = _HEAD.one({"id": HEAD})
    if head is None:
        raise RuntimeError("the table audit_head is empty; restore the database from a backup")
    return head[0], head[1]


def raise_alert(alert: SystemAlert, about: str = "") -> bool:
    """Publish an alert, unless any process published one of this kind within the last hour.

    Alerts of one kind that differ in `about` are limited separately. Return whether the alert was published.
    """
    is_due = acquire_lease(f"audit.alert.{alert.kind}{about}", new_id(), ALERT_SECONDS)
    if is_due:
        emit(alert, object=("audit_log", "audit"))
    return is_due


class AuditLog:
    """Records audit entries in the unit of work of the audited change. Implements `corral.plugin.Audit`.

    The counters of rows and of failures cover only this process.
    """

    def __init__(self, work: Work, settings: Settings, redactor: Redactor) -> None:
        self._work, self._settings, self._redactor = work, settings, redactor
        self._deduplicator = Deduplicator()
        self.rows: Counter[str] = Counter()
        self.failures, self._reported_failures = 0, 0
        self.append_seconds = Histogram()

    @property
    def verbose(self) -> bool:
        """Whether every request is recorded (setting `audit.verbose`)."""
        return self._settings.get(VERBOSE)

    def record(self, entry: AuditEntry) -> None:
        """Add a row in the current unit of work.

        If the row cannot be written, the unit of work fails with the code `audit_unavailable`. If the same denied
        action is repeated within a minute, only the first denial becomes a row; the repetitions are counted.
        """
        unit = current()
        repeats = entry.outcome == "denied" or entry.action in DEDUPLICATED
        by = unit.entry
        if repeats and self._deduplicator.is_repetition(entry, by):
            after_commit(lambda: self._deduplicator.count(entry, by))
            return
        self._buffer_entry(unit, entry)
        if repeats:
            after_commit(lambda: self._deduplicator.start_counting(entry, by))

    def record_request(self, route: Route, path: str, status: int, code: str | None) -> None:
        """Add an audit row for a request with the status of its response and, if it failed, the problem code."""
        area = route.needs[0].rpartition(".")[0] or route.plugin
        entry = AuditEntry(
            action=f"{area}.request.{'read' if route.method == 'GET' else 'write'}",
            object_type="route",
            object_id=route.label,
            object_name=path,
            outcome="success" if status < 400 else "denied" if status == 403 else "failed",
            code=code,
        )
        self.record(entry)

    async def write_repetitions(self, *, all: bool = False) -> None:
        """Write the repetition counts of all entries whose one-minute counting period has ended.

        If `all` is true, write the counts of all other entries too.
        """
        for repeated in self._deduplicator.take_ended(all=all):
            try:
                summary = functools.partial(self._record_summary, repeated)
                await self._work(summary, entry=repeated.by)
            except Problem:
                self._deduplicator.put_back(repeated)

    def _record_summary(self, repeated: RepeatedEntry) -> None:
        self._buffer_entry(current(), repeated.summary_entry())

    async def report_failures(self) -> None:
        """Alert admins, at most once an hour, about rows that could not be written since the last alert."""
        failures = self.failures
        if failures == self._reported_failures:
            return
        count = failures - self._reported_failures
        detail = f"One process could not write {count} rows of the audit log, so it refused the operations."
        alert = SystemAlert(
            kind="audit_write_failed", severity="critical", title="The audit log cannot be written", detail=detail
        )
        if await self._work(lambda: raise_alert(alert), entry=UnitContext("audit.alert")):
            self._reported_failures = failures

    def _buffer_entry(self, unit: Unit, entry: AuditEntry) -> None:
        record_ip = self._settings.get(RECORD_IP)
        columns = entry_columns(entry, unit.entry, self._redactor, record_ip=record_ip)
        unit.audit.append(lambda: self._append_row(unit, columns))

    def _append_row(self, unit: Unit, columns: dict[str, Any]) -> None:
        """Append a row at the end of the unit of work.

        This method locks the chain, links the row to the previous one and advances the head.
        """
        began = time.perf_counter()
        try:
            self._insert_chained_row(columns)
        except Problem:
            raise
        except Exception as error:
            self._raise_write_error(error)
            raise
        took = time.perf_counter() - began

        def count() -> None:
            self.rows[columns["outcome"]] += 1
            self.append_seconds.observe(took)

        unit.after.append(count)

    @staticmethod
    def _insert_chained_row(columns: dict[str, Any]) -> None:
        seq, prev_hash = lock_chain_head()
        values = {**columns, "seq": seq + 1, "id": new_id(), "ts": clock.now(), "prev_hash": prev_hash}
        values["hash"] = chain.build_row_without_hash([values[name] for name in chain.COLUMNS[:-1]]).digest()
        _INSERT.run(values)
        if not _ADVANCE.run({"seq": values["seq"], "hash": values["hash"], "was": seq}):
            raise RuntimeError("another process appended a row to the audit log at the same time")
        if values["seq"] % CHECKPOINT_ROWS == 0:
            enqueue("audit.checkpoint")

    def _raise_write_error(self, error: Exception) -> None:
        """Raise an error for a row that could not be written.

        Errors caused by a lost connection, a full disk or a busy database keep their own codes. Any other failure
        becomes `audit_unavailable`.
        """
        if not current().is_open():
            raise error
        known = translate_error(error) if isinstance(error, (peewee.DatabaseError, peewee.InterfaceError)) else error
        if isinstance(known, Problem) and known.code in ("storage_full", "overloaded"):
            raise known
        self.failures += 1
        log.error("cannot write to the audit log", exc_info=error)
        raise Unavailable(
            "The audit log cannot be written, so the change was rejected; try again later.",
            code="audit_unavailable",
            retry_after=5,
        ) from error


class AccessRecorder:
    """Records accesses to the audit log.

    If a row cannot be written, the failure is only logged and counted, so that auditors can still read the log.
    """

    def __init__(self, work: Work, audit: AuditLog) -> None:
        self._work, self._audit = work, audit

    async def record_access(self, verb: str, by: UnitContext, **details: Any) -> None:
        """Append a row with the action `audit.log.<verb>`."""
        given = {name: value for name, value in details.items() if value not in (None, {})}
        entry = AuditEntry(action=f"audit.log.{verb}", object_type="audit_log", object_id=None, details=given)
        try:
            await self._work(lambda: self._audit.record(entry), entry=by)
        except Unavailable:
            log.warning("cannot record an access to the audit log", extra={"action": entry.action})
