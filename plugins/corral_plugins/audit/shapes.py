"""What comes in and goes out of the audit log."""

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


class Filters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of the list and of exports. `actor`: who acted, or for whom; `action`: a name, or a prefix such as `auth.*`."""

    actor: list[Named] | UnsetType = UNSET
    action: list[Named] | UnsetType = UNSET
    object_type: list[Named] | UnsetType = UNSET
    object_id: list[Named] | UnsetType = UNSET
    outcome: list[Outcome] | UnsetType = UNSET
    since: Instant | UnsetType = UNSET
    until: Instant | UnsetType = UNSET
    request_id: Named | UnsetType = UNSET


class AuditQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The list's query: a page, and the fields of `Filters` once more, since a struct has one base."""

    actor: list[Named] | UnsetType = UNSET
    action: list[Named] | UnsetType = UNSET
    object_type: list[Named] | UnsetType = UNSET
    object_id: list[Named] | UnsetType = UNSET
    outcome: list[Outcome] | UnsetType = UNSET
    since: Instant | UnsetType = UNSET
    until: Instant | UnsetType = UNSET
    request_id: Named | UnsetType = UNSET


class ExportQuery(Filters, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`jsonl`: a row a line, as it is hashed. `csv`: for spreadsheets."""

    format: Annotated[str, Meta(max_length=20)] = "jsonl"


class VerifyQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of the log; by default all that is kept."""

    from_seq: Seq | UnsetType = UNSET
    to_seq: Seq | UnsetType = UNSET


class ActorView(msgspec.Struct, kw_only=True):
    """Who acted. `on_behalf_of`: the person whose rights counted, where the actor is not that person."""

    type: str
    id: str | None
    on_behalf_of: str | None
    session_id: str | None
    key_id: str | None
    ip: str | None
    user_agent: str | None


class ObjectView(msgspec.Struct, kw_only=True):
    """What was acted on; `name` as it was then."""

    type: str
    id: str | None
    name: str | None


class FieldChange(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """A field before and after; of a secret only that it changed."""

    field: str
    from_: Any
    to: Any


class AuditView(msgspec.Struct, kw_only=True):
    """A row of the log. `truncated`: the changes or details were too large; `sha256` is of the whole."""

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


class LinkView(msgspec.Struct, kw_only=True):
    """A place of the chain."""

    seq: int
    hash: str


class Verdict(msgspec.Struct, kw_only=True):
    """What was found. Not `complete`: time was up, go on with `?from_seq=` `next_seq`."""

    ok: bool
    checked: int
    complete: bool
    next_seq: int | None
    first_bad_seq: int | None
    reason: Reason | None
    head: LinkView
    checkpoints_checked: int


class CheckpointView(msgspec.Struct, kw_only=True):
    """A signed place of the log."""

    seq: int
    hash: str
    rows: int
    ts: str
    signature: str
    key_id: str


class CheckpointPage(Page[CheckpointView], kw_only=True):
    """Checkpoints, newest first, and the key that signed them: Ed25519, 32 bytes in base64."""

    public_key: str | None
