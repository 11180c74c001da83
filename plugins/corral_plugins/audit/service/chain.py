"""The hash chain: which fields of a row are hashed, and how each row refers to the previous one.

`hash = SHA-256("corral.audit.v1" || canonical JSON of all other fields)`. Canonical: UTF-8, keys sorted, no spaces,
strings as stored. The structs declare their fields in alphabetical order, so that encoding them needs no sorting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

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


class Actor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The actor of an audit row and the client that the actor used."""

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


class Unhashed(msgspec.Struct, frozen=True, kw_only=True):
    """All fields of an audit row except `hash`. These are the hashed fields."""

    action: str
    actor: Actor
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


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A complete audit row. Its JSON encoding is one line of an export."""

    action: str
    actor: Actor
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
        """Return the hash that the row should contain, computed from all other fields."""
        return Unhashed(
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


def unhashed(values: Sequence[Any]) -> Unhashed:
    """Build an audit row without its hash from stored column values, in the order of `COLUMNS` without `hash`."""
    (
        seq,
        id_,
        ts,
        actor_type,
        actor_id,
        on_behalf_of,
        session_id,
        key_id,
        ip,
        user_agent,
        action,
        object_type,
        object_id,
        object_name,
        outcome,
        code,
        request_id,
        changes,
        details,
        sha256,
        prev_hash,
    ) = values
    return Unhashed(
        action=action,
        actor=Actor(
            id=actor_id,
            ip=ip,
            key_id=key_id,
            on_behalf_of=on_behalf_of,
            session_id=session_id,
            type=actor_type,
            user_agent=user_agent,
        ),
        changes=msgspec.Raw(changes),
        code=code,
        details=msgspec.Raw(details),
        id=id_,
        object=AuditObject(id=object_id, name=object_name, type=object_type),
        outcome=outcome,
        prev_hash=prev_hash,
        request_id=request_id,
        seq=seq,
        sha256=sha256,
        truncated=sha256 is not None,
        ts=ts,
    )


def row(values: Sequence[Any]) -> Row:
    """Build a complete audit row from stored column values, in the order of `COLUMNS`."""
    found = unhashed(values[:-1])
    return Row(
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
