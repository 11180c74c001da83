"""Shapes of secrets as admins send and see them. No answer but that of `reveal` holds a value."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, Slug

MASK = "********"
NAME = r"^[A-Za-z][A-Za-z0-9_.-]{0,127}(?![\s\S])"
HOST = r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*(?![\s\S])"
CONSUMER = r"^(plugin|agent|workflow|trigger|tool|worker_group):[A-Za-z0-9][A-Za-z0-9_.:/-]{0,199}(?![\s\S])"

Status = Literal["active", "expiring", "expired", "deleted"]
Name = Annotated[str, Meta(pattern=NAME)]
Value = Annotated[str, Meta(min_length=1, max_length=65536)]
Description = Annotated[str, Meta(max_length=2000)]
Consumers = Annotated[list[Annotated[str, Meta(pattern=CONSUMER)]], Meta(max_length=100)]
Hosts = Annotated[list[Annotated[str, Meta(max_length=253, pattern=HOST)]], Meta(max_length=50)]
Kept = Annotated[int, Meta(ge=1, le=100)]


class NewSecret(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A secret to store."""

    name: Name
    value: Value
    category: Slug = "general"
    description: Description = ""
    expires_at: MomentIn | None = None
    allowed_consumers: Consumers = []
    allowed_hosts: Hosts = []
    max_versions: Kept | None = None


class SecretPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to change; what is absent stays. `value` makes a version; `cas`: the version it is made upon."""

    name: Name | UnsetType = UNSET
    value: Value | UnsetType = UNSET
    category: Slug | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    expires_at: MomentIn | UnsetType | None = UNSET
    allowed_consumers: Consumers | UnsetType = UNSET
    allowed_hosts: Hosts | UnsetType = UNSET
    max_versions: Kept | UnsetType = UNSET
    cas: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class Generate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a new value is made."""

    length: Annotated[int, Meta(ge=8, le=4096)] = 32
    charset: Literal["alnum", "ascii", "hex", "base64url"] = "alnum"


class Rotation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The new value, or how to make one; the old one stays valid for Corral's own checks for `grace_seconds`."""

    value: Value | None = None
    generate: Generate | None = None
    grace_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0


class Reveal(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Why the value is to be shown; it is written into the audit log."""

    reason: Annotated[str, Meta(min_length=3, max_length=500)]
    version: Annotated[int, Meta(ge=1)] | None = None


class Revealed(msgspec.Struct, kw_only=True):
    """The value."""

    value: str
    version: int


class SecretQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    """Which secrets; deleted ones only where `status` asks for them. `search`: in name and description."""

    category: list[Slug] = msgspec.field(default_factory=list)
    status: list[Status] = msgspec.field(default_factory=list)
    search: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET


class ExpiringQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    """Those that expire within so many days, and those that have expired."""

    days: Annotated[int, Meta(ge=1, le=365)] = 30


class DeleteQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`force`: also while something uses it."""

    force: bool = False


class Reference(msgspec.Struct, kw_only=True):
    """Who uses a secret."""

    kind: str
    id: str
    name: str


class SecretView(msgspec.Struct, kw_only=True):
    """A secret without its value. `read_only`: it comes from the variable `CORRAL_SECRET_<NAME>`."""

    id: str
    name: str
    masked: str = MASK
    category: str
    description: str
    status: Status
    version: int
    expires_at: Instant | None
    allowed_consumers: list[str]
    allowed_hosts: list[str]
    max_versions: int
    read_only: bool
    references: list[Reference]
    last_used_at: Instant | None
    last_revealed_at: Instant | None
    rotated_at: Instant | None
    created_by: str | None
    created_at: Instant | None
    updated_at: Instant | None
    warnings: list[str] | UnsetType = UNSET


class VersionView(msgspec.Struct, kw_only=True):
    """A value of a secret, without the value."""

    n: int
    state: Literal["current", "grace", "old", "destroyed"]
    created_by: str | None
    created_at: Instant
    grace_until: Instant | None


class KeyCount(msgspec.Struct, kw_only=True):
    """A master key and the rows that need it. `label`: null when the key is not loaded here."""

    key_id: str
    label: str | None
    rows: int


class KeyStatus(msgspec.Struct, kw_only=True):
    """The master keys. `remaining`: rows that are not under the active one."""

    sealed: bool
    active_key: str | None
    keys: list[KeyCount]
    remaining: int
    rotating: bool


class Remaining(msgspec.Struct, kw_only=True):
    """How many rows are still to be rewrapped."""

    remaining: int
