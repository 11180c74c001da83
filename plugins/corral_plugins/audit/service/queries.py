"""Queries for lists, single rows and ranges of the audit log. All functions run in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import ALL_ROWS
from corral.database.statement import Statement
from corral.database.unit import current
from corral.errors import NotFound
from corral.http.page import Order, Page, paginate
from corral_plugins.audit.models import HEAD, AuditRow, AuditSigningKey, ChainHead, CheckpointRow
from corral_plugins.audit.service import chain
from corral_plugins.audit.service.chain import ChainLink
from corral_plugins.audit.service.signing import SignedCheckpoint
from corral_plugins.audit.shapes import (
    ActorView,
    AuditFilters,
    AuditQuery,
    AuditView,
    CheckpointPage,
    CheckpointView,
    FieldChange,
    ObjectView,
)

RETAINED = "audit.log.retain"
"""The action of the row that records the removal of the oldest rows. The object of this row is the new anchor."""

_COLUMNS = tuple(getattr(AuditRow, name) for name in chain.COLUMNS)
_ROWS_BETWEEN = Statement(
    lambda p: (
        AuditRow.select(*_COLUMNS)
        .where((AuditRow.seq > p("after")) & (AuditRow.seq <= p("until")))
        .order_by(AuditRow.seq)
        .tuples()
    )
)
_NAMES = (
    "WITH RECURSIVE names(action) AS (SELECT min(action) FROM audit_rows UNION ALL "
    "SELECT (SELECT min(action) FROM audit_rows WHERE action > names.action) FROM names "
    "WHERE names.action IS NOT NULL) SELECT action FROM names"
)
"""A query that lists the distinct actions. It reads one index entry per action, regardless of the number of rows."""


class ChainEnds(msgspec.Struct, frozen=True):
    """The head of the log, which is its newest row, and the anchor, which is the newest row removed as expired.

    Both are read in one snapshot. `stored` is the `seq` of the newest row in the table. It is lower than the head's
    `seq` if rows are missing.
    """

    head: ChainLink
    anchor: ChainLink
    stored: int


def chain_ends() -> ChainEnds:
    """Return the head and the anchor of the log.

    A single statement reads both, so that they are consistent with each other on every database engine.
    """
    newest: Any = AuditRow.select(AuditRow.seq).order_by(AuditRow.seq.desc()).limit(1)
    row: Any = ChainHead.select(
        ChainHead.seq, ChainHead.hash, ChainHead.anchor_seq, ChainHead.anchor_hash, newest
    ).where(ChainHead.id == HEAD)
    seq, hash_, anchor_seq, anchor_hash, stored = row.tuples().get()
    return ChainEnds(ChainLink(seq, hash_), ChainLink(anchor_seq, anchor_hash), stored or 0)


def rows_between(after: int, until: int) -> list[tuple[Any, ...]]:
    """Return the stored rows with `after < seq <= until`, in ascending order."""
    return _ROWS_BETWEEN.rows({"after": after, "until": until})


def hash_at(seq: int) -> str | None:
    """Return the hash of the row with this `seq`, or None if the row does not exist."""
    row = AuditRow.select(AuditRow.hash).where(AuditRow.seq == seq).tuples().first()
    return None if row is None else str(row[0])


def recorded_anchor(until: int) -> int:
    """Return the `seq` of the anchor according to the log, or 0 if no removal of rows is recorded.

    Each removal is recorded in a row whose object is the new anchor. Only rows up to `until` are considered.
    """
    removals = (AuditRow.action == RETAINED) & (AuditRow.seq <= until)
    row = AuditRow.select(AuditRow.object_id).where(removals).order_by(AuditRow.seq.desc()).tuples().first()
    return int(row[0]) if row is not None and str(row[0]).isdigit() else 0


def checkpoints_between(after: int, until: int) -> dict[int, SignedCheckpoint]:
    """Return the checkpoints with `after < seq <= until`, keyed by `seq`."""
    rows = CheckpointRow.select().where((CheckpointRow.seq > after) & (CheckpointRow.seq <= until))
    return {row.seq: SignedCheckpoint(**row.__data__) for row in rows}


def public_keys() -> list[str]:
    """Return all public keys in base64, oldest first."""
    rows: Any = AuditSigningKey.select(AuditSigningKey.public_key).order_by(AuditSigningKey.created_at).tuples()
    return [key for (key,) in rows]


def filter_condition(filters: AuditFilters | AuditQuery) -> Any:
    """Return the SQL condition for the filters.

    A row must match all given filters. If a filter has several values, the row must match at least one of them.
    """
    clause: Any = ALL_ROWS
    if filters.actor is not UNSET:
        clause &= AuditRow.actor_id.in_(filters.actor) | AuditRow.on_behalf_of.in_(filters.actor)
    if filters.action is not UNSET:
        clause &= _action_condition(filters.action)
    for name in ("object_type", "object_id", "outcome"):
        if (values := getattr(filters, name)) is not UNSET:
            clause &= getattr(AuditRow, name).in_(values)
    if filters.since is not UNSET:
        clause &= AuditRow.ts >= clock.from_datetime(filters.since)
    if filters.until is not UNSET:
        clause &= AuditRow.ts <= clock.from_datetime(filters.until)
    if filters.request_id is not UNSET:
        clause &= AuditRow.request_id == filters.request_id
    return clause


def _action_condition(patterns: list[str]) -> Any:
    """Return an SQL condition that selects rows by action names and prefixes.

    Prefixes are expanded to the existing names, because every database engine can use the index for a list of names.
    """
    names = {pattern for pattern in patterns if not pattern.endswith(".*")}
    prefixes = tuple(pattern[:-1] for pattern in patterns if pattern.endswith(".*"))
    if prefixes:
        found = current().connection.execute(_NAMES).fetchall()
        names |= {name for (name,) in found if name is not None and name.startswith(prefixes)}
    return AuditRow.action.in_(sorted(names))


class AuditQueries:
    """The queries used by the routes of the audit log."""

    def list_rows(self, query: AuditQuery, caller: Principal) -> Page[AuditView]:
        """Return a page of rows, newest first."""
        found, clause = chain_ends(), filter_condition(query)
        total = found.head.seq - found.anchor.seq if clause is ALL_ROWS else None
        rows = AuditRow.select().where(clause & (AuditRow.seq > found.anchor.seq))
        return paginate(rows, query, caller, scope="audit", order=(Order(AuditRow.seq),), make=audit_view, total=total)

    def get_row(self, row_id: str) -> AuditView:
        """Return the row with the given id. Raise `NotFound` if it does not exist."""
        row = AuditRow.get_or_none(AuditRow.id == row_id.lower())
        if row is None:
            raise NotFound("There is no row with this id in the audit log.")
        return audit_view(row)

    def list_checkpoints(self, query: Any, caller: Principal) -> CheckpointPage:
        """Return a page of checkpoints, newest first, with the newest public key."""
        page = paginate(
            CheckpointRow.select(),
            query,
            caller,
            scope="audit.checkpoints",
            order=(Order(CheckpointRow.seq),),
            make=lambda row: CheckpointView(**row.__data__),
        )
        keys = public_keys()
        return CheckpointPage(**msgspec.structs.asdict(page), public_key=keys[-1] if keys else None)


def audit_view(row: Any) -> AuditView:
    """Convert a database row to the view that the API returns."""
    try:
        changes = msgspec.json.decode(row.changes, type=list[FieldChange])
        details: Mapping[str, Any] = msgspec.json.decode(row.details, type=dict[str, Any])
    except (
        TypeError,
        msgspec.DecodeError,
    ):  # the row was tampered with: the verification reports it, and the list still works
        changes, details = [], {"unreadable": True}
    actor = ActorView(
        type=row.actor_type,
        id=row.actor_id,
        on_behalf_of=row.on_behalf_of,
        session_id=row.session_id,
        key_id=row.key_id,
        ip=row.ip,
        user_agent=row.user_agent,
    )
    return AuditView(
        seq=row.seq,
        id=row.id,
        ts=row.ts,
        actor=actor,
        action=row.action,
        object=ObjectView(type=row.object_type, id=row.object_id, name=row.object_name),
        outcome=row.outcome,
        code=row.code,
        request_id=row.request_id,
        changes=changes,
        details=dict(details),
        truncated=row.sha256 is not None,
        sha256=row.sha256,
        prev_hash=row.prev_hash,
        hash=row.hash,
    )
