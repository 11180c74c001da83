"""Request and response bodies of the sign-in and password policies. Their bounds equal those of the settings."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.schema.fields import line
from corral_core.accounts.api import Role
from corral_plugins.security.shapes import Mode

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
    ip_mode: Mode
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
