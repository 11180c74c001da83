"""The request and response bodies of the audit log's routes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import Page, PageQuery

Outcome = Literal["success", "denied", "failed"]
Named = Annotated[str, Meta(min_length=1, max_length=200)]
Instant = Annotated[datetime, Meta(tz=True)]
Reason = Literal[
    "hash_mismatch", "broken_link", "gap", "duplicate_seq", "tail_truncated", "checkpoint_mismatch", "bad_signature"
]
Seq = Annotated[int, Meta(ge=1, le=2**62)]


class AuditFilters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing and exporting audit rows.

    `actor` matches the actor, or the user on whose behalf the actor acted. `action` is a name, or a prefix such as
    `auth.*`.
    """

    actor: list[Named] | UnsetType = UNSET
    action: list[Named] | UnsetType = UNSET
    object_type: list[Named] | UnsetType = UNSET
    object_id: list[Named] | UnsetType = UNSET
    outcome: list[Outcome] | UnsetType = UNSET
    since: Instant | UnsetType = UNSET
    until: Instant | UnsetType = UNSET
    request_id: Named | UnsetType = UNSET


class AuditQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Query parameters for listing audit rows.

    This struct repeats the fields of `AuditFilters`, because a struct can have only one base class.
    """

    actor: list[Named] | UnsetType = UNSET
    action: list[Named] | UnsetType = UNSET
    object_type: list[Named] | UnsetType = UNSET
    object_id: list[Named] | UnsetType = UNSET
    outcome: list[Outcome] | UnsetType = UNSET
    since: Instant | UnsetType = UNSET
    until: Instant | UnsetType = UNSET
    request_id: Named | UnsetType = UNSET


class ExportQuery(AuditFilters, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Query parameters of an export. `format` is `jsonl`, with one row per line, or `csv` for spreadsheets."""

    format: Annotated[str, Meta(max_length=20)] = "jsonl"


class VerifyQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The range of rows to verify. The default is all retained rows."""

    from_seq: Seq | UnsetType = UNSET
    to_seq: Seq | UnsetType = UNSET


class ActorView(msgspec.Struct, kw_only=True):
    """The actor of an action. `on_behalf_of` is the user whose permissions applied, if different from the actor."""

    type: str
    id: str | None
    on_behalf_of: str | None
    session_id: str | None
    key_id: str | None
    ip: str | None
    user_agent: str | None


class ObjectView(msgspec.Struct, kw_only=True):
    """The object of an action. `name` is the name of the object at the time of the action."""

    type: str
    id: str | None
    name: str | None


class FieldChange(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """A changed field with its previous and new values. For secrets, both values are omitted."""

    field: str
    from_: Any
    to: Any


class AuditView(msgspec.Struct, kw_only=True):
    """A row of the audit log.

    If `truncated` is true, the changes or details were too large to store; `sha256` is then the hash of their full
    content.
    """

    seq: int
    id: str
    ts: str
    actor: ActorView
    action: str
    object: ObjectView
    outcome: Outcome
    code: str | None
    request_id: str | None
    changes: list[FieldChange]
    details: dict[str, Any]
    truncated: bool
    sha256: str | None
    prev_hash: str
    hash: str


class ChainLinkView(msgspec.Struct, kw_only=True):
    """A position in the hash chain."""

    seq: int
    hash: str


class VerificationResult(msgspec.Struct, kw_only=True):
    """The result of a verification. If `complete` is false, the time limit was reached.

    To continue, start another verification with the value of `next_seq` as its `from_seq`.
    """

    ok: bool
    checked: int
    complete: bool
    next_seq: int | None
    first_bad_seq: int | None
    reason: Reason | None
    head: ChainLinkView
    checkpoints_checked: int


class CheckpointView(msgspec.Struct, kw_only=True):
    """A signed position in the hash chain."""

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str


class CheckpointPage(Page[CheckpointView], kw_only=True):
    """A page of checkpoints, newest first, and the Ed25519 public key for verifying them (32 bytes in base64)."""

    public_key: str | None
