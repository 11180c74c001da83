"""The shapes of `/security`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, Name, line
from corral_core.accounts.api import OwnerView

Mode = Literal["off", "allowlist", "blocklist"]
Action = Literal["allow", "block"]
KeyStatus = Literal["active", "expired", "revoked"]
Cidr = Annotated[str, Meta(min_length=2, max_length=49)]
MAX_RULES, MAX_SCOPES, MAX_CIDRS = 500, 100, 20


class KeyView(msgspec.Struct, kw_only=True):
    """An API key. Its text is shown once, when it is made or rotated."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    allowed_cidrs: list[str]
    status: KeyStatus
    owner: OwnerView
    created_at: Instant
    expires_at: Instant
    last_used_at: Instant | None
    last_used_ip: str | None


class IssuedKey(KeyView, kw_only=True):
    """With its text, which is shown this once."""

    key: str


class NewKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`scopes`: permissions, `<plugin>.*`, `*.read` or `*`. Without `expires_at` it lives the usual time."""

    name: Name
    scopes: Annotated[list[Annotated[str, line(100)]], Meta(min_length=1, max_length=MAX_SCOPES)] = msgspec.field(
        default_factory=lambda: ["*.read"]
    )
    expires_at: MomentIn | None = None
    allowed_cidrs: Annotated[list[Cidr], Meta(max_length=MAX_CIDRS)] = msgspec.field(default_factory=list)


class Rotation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How long the old text works beside the new one."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0


class KeyQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`all`: those of everybody, for admins."""

    status: list[KeyStatus] = msgspec.field(default_factory=list)
    all: bool = False


class ScopeView(msgspec.Struct, kw_only=True):
    """A permission that a key may have, and the roles that hold it."""

    scope: str
    title: str
    plugin: str
    roles: list[str]


class ScopeList(msgspec.Struct, kw_only=True):
    """By name."""

    items: list[ScopeView]


class RuleView(msgspec.Struct, kw_only=True):
    """A rule about a network."""

    id: str
    cidr: str
    action: Action
    note: str
    expires_at: Instant | None
    created_by: str | None
    created_at: Instant


class NewRule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rule about an address or a network."""

    cidr: Cidr
    action: Action
    note: Annotated[str, line(200, 0)] = ""
    expires_at: MomentIn | None = None


class RulesView(msgspec.Struct, kw_only=True):
    """The rules and how they count. `your_ip`: the address from which you ask."""

    mode: Mode
    rules: list[RuleView]
    version: int
    your_ip: str


class NewRules(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All rules, which take the place of those before. `force`: also if you lock yourself out."""

    mode: Mode
    rules: Annotated[list[NewRule], Meta(max_length=MAX_RULES)]
    force: bool = False


class Address(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An address to be judged."""

    ip: Annotated[str, Meta(min_length=2, max_length=45)]


class Judgement(msgspec.Struct, kw_only=True):
    """Whether a client of this address may come in, and the rule that says so (null: none, the mode decides)."""

    allowed: bool
    rule: RuleView | None


class Revocation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What else ends beside the sessions."""

    include_api_keys: bool = False


class Revoked(msgspec.Struct, kw_only=True):
    """How many ended."""

    sessions: int
    api_keys: int
