"""The hash chain. Each audit row has a hash of all its other fields, which include the hash of the previous row.

`hash = SHA-256("corral.audit.v1" || canonical JSON of all other fields)`. Canonical JSON is UTF-8 with sorted keys and
without spaces; strings are encoded exactly as they are stored. The structs declare their fields in alphabetical order,
so that encoding them needs no sorting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from corral_plugins.audit.service.signing import PublicKeys, SignedCheckpoint
from corral_plugins.audit.shapes import Reason

PREFIX = b"corral.audit.v1"
GENESIS = "0" * 64
"""The value of `prev_hash` in the first row."""

COLUMNS = (
    "seq",
    "id",
    "ts",
    "actor_type",
    "actor_id",
    "on_behalf_of",
    "session_id",
    "key_id",
    "ip",
    "user_agent",
    "action",
    "object_type",
    "object_id",
    "object_name",
    "outcome",
    "code",
    "request_id",
    "changes",
    "details",
    "sha256",
    "prev_hash",
    "hash",
)


class RowActor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The actor of an audit row, and the client that the actor used."""

    id: str | None
    ip: str | None
    key_id: str | None
    on_behalf_of: str | None
    session_id: str | None
    type: str
    user_agent: str | None


class AuditObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The object on which an audited action was performed."""

    id: str | None
    name: str | None
    type: str


class UnhashedRow(msgspec.Struct, frozen=True, kw_only=True):
    """All fields of an audit row except `hash`."""

    action: str
    actor: RowActor
    changes: msgspec.Raw
    code: str | None
    details: msgspec.Raw
    id: str
    object: AuditObject
    outcome: str
    prev_hash: str
    request_id: str | None
    seq: int
    sha256: str | None
    truncated: bool
    ts: str

    def digest(self) -> str:
        """Return the SHA-256 hash of the row as hexadecimal text."""
        return hashlib.sha256(PREFIX + msgspec.json.encode(self)).hexdigest()


class HashedRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A complete audit row. Each line of an export is the JSON encoding of one row."""

    action: str
    actor: RowActor
    changes: msgspec.Raw
    code: str | None
    details: msgspec.Raw
    hash: str
    id: str
    object: AuditObject
    outcome: str
    prev_hash: str
    request_id: str | None
    seq: int
    sha256: str | None
    truncated: bool
    ts: str

    def digest(self) -> str:
        """Compute the correct value of `hash` from all other fields of the row."""
        return UnhashedRow(
            action=self.action,
            actor=self.actor,
            changes=self.changes,
            code=self.code,
            details=self.details,
            id=self.id,
            object=self.object,
            outcome=self.outcome,
            prev_hash=self.prev_hash,
            request_id=self.request_id,
            seq=self.seq,
            sha256=self.sha256,
            truncated=self.truncated,
            ts=self.ts,
        ).digest()


def build_row_without_hash(values: Sequence[Any]) -> UnhashedRow:
    """Build an audit row without its hash. `values` contains the stored column values in the order of `COLUMNS`.

    The value of the last column, `hash`, may be omitted.
    """
    column = dict(zip(COLUMNS, values, strict=False))
    return UnhashedRow(
        action=column["action"],
        actor=RowActor(
            id=column["actor_id"],
            ip=column["ip"],
            key_id=column["key_id"],
            on_behalf_of=column["on_behalf_of"],
            session_id=column["session_id"],
            type=column["actor_type"],
            user_agent=column["user_agent"],
        ),
        changes=msgspec.Raw(column["changes"]),
        code=column["code"],
        details=msgspec.Raw(column["details"]),
        id=column["id"],
        object=AuditObject(id=column["object_id"], name=column["object_name"], type=column["object_type"]),
        outcome=column["outcome"],
        prev_hash=column["prev_hash"],
        request_id=column["request_id"],
        seq=column["seq"],
        sha256=column["sha256"],
        truncated=column["sha256"] is not None,
        ts=column["ts"],
    )


def hashed_row(values: Sequence[Any]) -> HashedRow:
    """Build a complete audit row. `values` contains the stored column values in the order of `COLUMNS`."""
    found = build_row_without_hash(values[:-1])
    return HashedRow(
        action=found.action,
        actor=found.actor,
        changes=found.changes,
        code=found.code,
        details=found.details,
        hash=values[-1],
        id=found.id,
        object=found.object,
        outcome=found.outcome,
        prev_hash=found.prev_hash,
        request_id=found.request_id,
        seq=found.seq,
        sha256=found.sha256,
        truncated=found.truncated,
        ts=found.ts,
    )


# -- the check


class ChainLink(msgspec.Struct, frozen=True):
    """A position in the hash chain: the sequence number of a row, and its hash."""

    seq: int
    hash: str


BEGINNING = ChainLink(0, GENESIS)


class ChainDefect(msgspec.Struct, frozen=True):
    """The first defect in a hash chain: the sequence number of the defective row, and the reason."""

    seq: int
    reason: Reason


class ChainChecker:
    """Checks the hashes of audit rows in order, and compares them with checkpoints, up to the first defect.

    `after` is the chain position of the row before the first checked row. If it is None, the first row is trusted, as
    in a partial export. If `sparse` is true, missing rows are accepted, as in a filtered export.
    """

    def __init__(
        self,
        after: ChainLink | None,
        checkpoints: Mapping[int, SignedCheckpoint],
        keys: PublicKeys,
        *,
        sparse: bool = False,
    ) -> None:
        self.last = after
        self.bad: ChainDefect | None = None
        self.checked = self.checkpoints_checked = 0
        self._checkpoints, self._keys, self._sparse = checkpoints, keys, sparse

    def check_rows(self, rows: Iterable[HashedRow]) -> None:
        """Check the next rows of the chain. The rows must be passed in order."""
        for row in rows:
            if self.bad is None:
                self._check_row(row)

    def report_defect(self, seq: int, reason: Reason) -> None:
        """Record a defect found by the caller, unless an earlier defect is already recorded."""
        if self.bad is None:
            self.bad = ChainDefect(seq, reason)

    def finish(self, head: ChainLink | None) -> None:
        """Finish the check: verify that the last row matches `head` and that no checkpoint covers a later row."""
        last = self.last or BEGINNING
        if head is not None and head.seq > last.seq:
            self.report_defect(last.seq + 1, "tail_truncated")
        if head is not None and head.seq < last.seq:
            self.report_defect(head.seq + 1, "broken_link")
        if head is not None and head.hash != last.hash:
            self.report_defect(last.seq, "hash_mismatch")
        beyond = [checkpoint for seq, checkpoint in sorted(self._checkpoints.items()) if seq > last.seq]
        for checkpoint in beyond:
            self.checkpoints_checked += 1
            signed = self._keys.verify_signature(checkpoint)
            self.report_defect(
                last.seq + 1 if signed else checkpoint.seq, "tail_truncated" if signed else "bad_signature"
            )

    def _check_row(self, row: HashedRow) -> None:
        if not self._check_order(row):
            return None
        try:
            intact = row.digest() == row.hash
        except (TypeError, ValueError):  # a value has a type that a genuine row never contains
            intact = False
        if not intact:
            return self.report_defect(row.seq, "hash_mismatch")
        if self.last is not None and row.prev_hash != self.last.hash and row.seq == self.last.seq + 1:
            return self.report_defect(row.seq, "broken_link")
        checkpoint = self._checkpoints.get(row.seq)
        if checkpoint is not None:
            self.checkpoints_checked += 1
            if not self._keys.verify_signature(checkpoint):
                return self.report_defect(row.seq, "bad_signature")
            if checkpoint.hash != row.hash:
                return self.report_defect(row.seq, "checkpoint_mismatch")
        self.checked += 1
        self.last = ChainLink(row.seq, row.hash)
        return None

    def _check_order(self, row: HashedRow) -> bool:
        if self.last is None:
            return True
        if row.seq <= self.last.seq:
            self.report_defect(row.seq, "duplicate_seq")
        elif row.seq > self.last.seq + 1 and not self._sparse:
            self.report_defect(self.last.seq + 1, "gap")
        return self.bad is None
