"""The request and response bodies of the security routes. Policy fields have the same bounds as the settings."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, MomentIn, Name, line
from corral_core.accounts.api import OwnerView, Role

IpRulesMode = Literal["off", "allowlist", "blocklist"]
Action = Literal["allow", "block"]
KeyStatus = Literal["active", "expired", "revoked"]
Cidr = Annotated[str, Meta(min_length=2, max_length=49)]
MAX_RULES, MAX_SCOPES, MAX_CIDRS = 500, 100, 20


class KeyView(msgspec.Struct, kw_only=True):
    """An API key without its token."""

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
    """An API key with its token in `key`. No other response contains the token."""

    key: str


class NewKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to create an API key. `scopes` accepts permissions, `<plugin>.*`, `*.read` and `*`.

    If `expires_at` is omitted, the key expires after the number of days in `security.api_key_default_days`.
    """

    name: Name
    scopes: Annotated[list[Annotated[str, line(100)]], Meta(min_length=1, max_length=MAX_SCOPES)] = msgspec.field(
        default_factory=lambda: ["*.read"]
    )
    expires_at: MomentIn | None = None
    allowed_cidrs: Annotated[list[Cidr], Meta(max_length=MAX_CIDRS)] = msgspec.field(default_factory=list)


class ApiKeyRotation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for rotating an API key. The old token stays valid for `overlap_seconds`."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0


class KeyQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing keys. If `all` is true, admins see the keys of all users."""

    status: list[KeyStatus] = msgspec.field(default_factory=list)
    all: bool = False


class ScopeView(msgspec.Struct, kw_only=True):
    """A permission that can be included in a key's scopes, and the roles that hold it."""

    scope: str
    title: str
    plugin: str
    roles: list[str]


class ScopeList(msgspec.Struct, kw_only=True):
    """The available scopes, sorted by name."""

    items: list[ScopeView]


class RuleView(msgspec.Struct, kw_only=True):
    """A rule that allows or blocks an address or a network."""

    id: str
    cidr: str
    action: Action
    note: str
    expires_at: Instant | None
    created_by: str | None
    created_at: Instant


class NewRule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new IP rule. `cidr` is an address or a network."""

    cidr: Cidr
    action: Action
    note: Annotated[str, line(200, 0)] = ""
    expires_at: MomentIn | None = None


class RulesView(msgspec.Struct, kw_only=True):
    """The IP rules and their mode. `your_ip` is the client address of this request."""

    mode: IpRulesMode
    rules: list[RuleView]
    version: int
    your_ip: str


class NewRules(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The complete list of rules.

    `force` applies the list even if it rejects the client address of this request.
    """

    mode: IpRulesMode
    rules: Annotated[list[NewRule], Meta(max_length=MAX_RULES)]
    force: bool = False


class AddressToCheck(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An address to check against the IP rules."""

    ip: Annotated[str, Meta(min_length=2, max_length=45)]


class AddressVerdict(msgspec.Struct, kw_only=True):
    """Whether an address is allowed, and the rule that applies to the address.

    `rule` is null if no rule matches the address; the mode then determines the result.
    """

    allowed: bool
    rule: RuleView | None


class SessionRevocation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for ending all sessions of a user."""

    include_api_keys: bool = False


class RevocationResult(msgspec.Struct, kw_only=True):
    """The number of ended sessions and the number of revoked API keys."""

    sessions: int
    api_keys: int


# -- policies


DAY = 86_400
Registration = Literal["open", "invite", "closed"]
NewcomerRole = Literal["member", "viewer"]
Roles = Annotated[list[Role], Meta(max_length=4)]
AccessTtl = Annotated[int, Meta(ge=60, le=3600)]
IdleTtl = Annotated[int, Meta(ge=3600, le=30 * DAY)]
AbsoluteTtl = Annotated[int, Meta(ge=3600, le=90 * DAY)]
Grace = Annotated[int, Meta(ge=0, le=60)]
Threshold = Annotated[int, Meta(ge=3, le=20)]
Window = Annotated[int, Meta(ge=60, le=DAY)]
LockSeconds = Annotated[int, Meta(ge=60, le=3600)]
StepUp = Annotated[int, Meta(ge=60, le=900)]
Hundred = Annotated[int, Meta(ge=1, le=100)]
KeyDays = Annotated[int, Meta(ge=1, le=365)]
MinLength = Annotated[int, Meta(ge=8, le=64)]
Words = Annotated[list[Annotated[str, line(100)]], Meta(max_length=100)]
History = Annotated[int, Meta(ge=0, le=24)]
MaxAge = Annotated[int, Meta(ge=1, le=3650)]
Notice = Literal[
    "registration_open_on_public_bind", "rate_limits_off", "metrics_open", "key_in_data_dir", "ip_rules_disabled"
]


class PolicyView(msgspec.Struct, kw_only=True):
    """The sign-in policy, with warnings about the configuration."""

    registration: Registration
    default_role: NewcomerRole
    email_verification: bool
    require_mfa: bool
    require_mfa_roles: list[Role]
    access_ttl_seconds: int
    refresh_idle_seconds: int
    refresh_absolute_seconds: int
    refresh_grace_seconds: int
    lockout_threshold: int
    lockout_window_seconds: int
    lockout_seconds: int
    step_up_seconds: int
    max_sessions_per_user: int
    api_keys_enabled: bool
    api_key_default_days: int
    api_key_max_days: int
    api_keys_per_user: int
    ip_mode: IpRulesMode
    warnings: list[Notice]
    version: int


class PolicyPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to the sign-in policy. Absent fields stay unchanged."""

    registration: Registration | UnsetType = UNSET
    default_role: NewcomerRole | UnsetType = UNSET
    email_verification: bool | UnsetType = UNSET
    require_mfa: bool | UnsetType = UNSET
    require_mfa_roles: Roles | UnsetType = UNSET
    access_ttl_seconds: AccessTtl | UnsetType = UNSET
    refresh_idle_seconds: IdleTtl | UnsetType = UNSET
    refresh_absolute_seconds: AbsoluteTtl | UnsetType = UNSET
    refresh_grace_seconds: Grace | UnsetType = UNSET
    lockout_threshold: Threshold | UnsetType = UNSET
    lockout_window_seconds: Window | UnsetType = UNSET
    lockout_seconds: LockSeconds | UnsetType = UNSET
    step_up_seconds: StepUp | UnsetType = UNSET
    max_sessions_per_user: Hundred | UnsetType = UNSET
    api_keys_enabled: bool | UnsetType = UNSET
    api_key_default_days: KeyDays | UnsetType = UNSET
    api_key_max_days: KeyDays | UnsetType = UNSET
    api_keys_per_user: Hundred | UnsetType = UNSET


class PasswordPolicyView(msgspec.Struct, kw_only=True):
    """The requirements for new passwords. Existing passwords stay valid."""

    min_length: int
    max_length: int
    breached_check: bool
    context_words: list[str]
    history: int
    require_upper: bool
    require_lower: bool
    require_digit: bool
    require_symbol: bool
    max_age_days: int | None
    version: int


class PasswordPolicyPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to the password policy. Absent fields stay unchanged."""

    min_length: MinLength | UnsetType = UNSET
    breached_check: bool | UnsetType = UNSET
    context_words: Words | UnsetType = UNSET
    history: History | UnsetType = UNSET
    require_upper: bool | UnsetType = UNSET
    require_lower: bool | UnsetType = UNSET
    require_digit: bool | UnsetType = UNSET
    require_symbol: bool | UnsetType = UNSET
    max_age_days: MaxAge | UnsetType | None = UNSET
