"""Run-time settings of the `accounts` plugin: sign-in, API keys, passwords, mail, and the installation's name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from corral.plugin import Setting, Settings
from corral_core.accounts.api import REGISTRATION, TIMEZONE

HOUR, DAY = 3600, 86_400
Covered = Literal["admin", "member", "viewer", "auditor"]


def _requires_mail_server(value: bool, settings: Settings) -> str | None:
    return "requires a mail server; set mail.host first" if value and settings.get(MAIL_HOST) is None else None


def _is_address(value: str | None, settings: Settings) -> str | None:
    is_one = value is None or re.fullmatch(r"[^\s@]+@[^\s@]+", value)
    return None if is_one else "must be an address, such as corral@example.org"


def _within_absolute_lifetime(value: int, settings: Settings) -> str | None:
    if value <= settings.get(REFRESH_ABSOLUTE):
        return None
    return "must not exceed security.refresh_absolute_seconds; change both together"


DEFAULT_ROLE = Setting(
    name="security.default_role", kind=str, default="member", title="Role of new accounts", choices=("member", "viewer")
)
EMAIL_VERIFICATION = Setting(
    name="security.email_verification",
    kind=bool,
    default=False,
    title="Whether users need a verified email address to sign in",
    check=_requires_mail_server,
)
REQUIRE_MFA = Setting(name="security.require_mfa", kind=bool, default=False, title="Whether users need a second factor")
REQUIRE_MFA_ROLES = Setting[list[Covered]](
    name="security.require_mfa_roles",
    kind=list[Covered],
    default=list(get_args(Covered)),
    title="Roles that need a second factor",
)
ACCESS_TTL = Setting(
    name="security.access_ttl_seconds",
    env="CORRAL_ACCESS_TTL",
    kind=int,
    default=900,
    title="Lifetime of access tokens, in seconds",
    minimum=60,
    maximum=HOUR,
)
REFRESH_IDLE = Setting(
    name="security.refresh_idle_seconds",
    kind=int,
    default=7 * DAY,
    title="Idle time after which a session ends, in seconds",
    minimum=HOUR,
    maximum=30 * DAY,
    check=_within_absolute_lifetime,
)
REFRESH_ABSOLUTE = Setting(
    name="security.refresh_absolute_seconds",
    env="CORRAL_REFRESH_TTL",
    kind=int,
    default=30 * DAY,
    title="Maximum lifetime of a session, in seconds",
    minimum=HOUR,
    maximum=90 * DAY,
)
REFRESH_GRACE = Setting(
    name="security.refresh_grace_seconds",
    env="CORRAL_REFRESH_GRACE",
    kind=int,
    default=10,
    minimum=0,
    maximum=60,
    title="Grace period during which a used refresh token returns the same new token, in seconds",
)
LOCKOUT_THRESHOLD = Setting(
    name="security.lockout_threshold",
    env="CORRAL_LOCKOUT_THRESHOLD",
    kind=int,
    default=5,
    minimum=3,
    maximum=20,
    title="Number of failed sign-ins within the window after which an email address is locked",
)
LOCKOUT_WINDOW = Setting(
    name="security.lockout_window_seconds",
    env="CORRAL_LOCKOUT_WINDOW",
    kind=int,
    default=900,
    minimum=60,
    maximum=DAY,
    title="Window in which failed sign-ins are counted, in seconds",
)
LOCKOUT_SECONDS = Setting(
    name="security.lockout_seconds",
    env="CORRAL_LOCKOUT_SECONDS",
    kind=int,
    default=900,
    minimum=60,
    maximum=HOUR,
    title="Duration of the first lockout in seconds; each further lockout lasts twice as long, up to one hour",
)
STEP_UP_SECONDS = Setting(
    name="security.step_up_seconds",
    kind=int,
    default=300,
    minimum=60,
    maximum=900,
    title="Time after re-authentication during which sensitive actions are allowed, in seconds",
)
MAX_SESSIONS = Setting(
    name="security.max_sessions_per_user",
    kind=int,
    default=20,
    title="Maximum number of sessions per user; a further sign-in ends the oldest one",
    minimum=1,
    maximum=100,
)
API_KEYS_ENABLED = Setting(
    name="security.api_keys_enabled", kind=bool, default=True, title="Whether users may create API keys"
)
API_KEY_DEFAULT_DAYS = Setting(
    name="security.api_key_default_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=365,
    title="Default lifetime of an API key, in days",
)
API_KEY_MAX_DAYS = Setting(
    name="security.api_key_max_days",
    kind=int,
    default=365,
    minimum=1,
    maximum=365,
    title="Maximum lifetime of an API key, in days",
)
API_KEYS_PER_USER = Setting(
    name="security.api_keys_per_user",
    kind=int,
    default=25,
    minimum=1,
    maximum=100,
    title="Maximum number of API keys per user",
)
MIN_LENGTH = Setting(
    name="password.min_length", kind=int, default=12, title="Minimum length of a password", minimum=8, maximum=64
)
BREACHED_CHECK = Setting(
    name="password.breached_check",
    kind=bool,
    default=True,
    title="Whether passwords that are known from data breaches are rejected",
)
CONTEXT_WORDS = Setting[list[str]](
    name="password.context_words",
    default=[],
    title="Words that a password must not contain",
    kind=list[Annotated[str, Meta(min_length=1, max_length=100)]],
    maximum=100,
)
HISTORY = Setting(
    name="password.history",
    kind=int,
    default=0,
    minimum=0,
    maximum=24,
    title="Number of former passwords that cannot be reused",
)
MAX_AGE_DAYS = Setting[int | None](
    name="password.max_age_days",
    kind=int | None,
    default=None,
    minimum=1,
    maximum=3650,
    title="Days after which a password must be changed at the next sign-in",
)
REQUIRE_UPPER = Setting(
    name="password.require_upper", kind=bool, default=False, title="Whether a password needs an upper-case letter"
)
REQUIRE_LOWER = Setting(
    name="password.require_lower", kind=bool, default=False, title="Whether a password needs a lower-case letter"
)
REQUIRE_DIGIT = Setting(
    name="password.require_digit", kind=bool, default=False, title="Whether a password needs a digit"
)
REQUIRE_SYMBOL = Setting(
    name="password.require_symbol", kind=bool, default=False, title="Whether a password needs a symbol"
)
MAIL_HOST = Setting[str | None](
    name="mail.host",
    kind=str | None,
    default=None,
    minimum=1,
    maximum=253,
    pattern=r"[A-Za-z0-9._:-]+",
    accepts="a host name or an address, such as smtp.example.org",
    title="Host name of the mail server (unset: no mail is sent)",
    description="The egress guard checks the address of the mail server: a server on a private network is allowed; a "
    "server on the machine that Corral runs on must be listed in CORRAL_EGRESS_ALLOW.",
)
MAIL_PORT = Setting(name="mail.port", kind=int, default=587, title="Port of the mail server", minimum=1, maximum=65535)
MAIL_USERNAME = Setting[str | None](
    name="mail.username",
    kind=str | None,
    default=None,
    title="User name for the mail server",
    minimum=1,
    maximum=254,
)
MAIL_PASSWORD = Setting[str | None](
    name="mail.password",
    kind=str | None,
    default=None,
    title="Password for the mail server",
    secret=True,
    description="The password for the mail server is sent only over TLS.",
)
MAIL_FROM = Setting[str | None](
    name="mail.from",
    kind=str | None,
    default=None,
    minimum=3,
    maximum=254,
    check=_is_address,
    title="Sender address of mails (unset: corral@ followed by the mail server)",
)
MAIL_SECURITY = Setting(
    name="mail.security",
    kind=str,
    default="starttls",
    title="Encryption of the connection to the mail server",
    choices=("starttls", "tls", "none"),
)
MAIL = (MAIL_HOST, MAIL_PORT, MAIL_USERNAME, MAIL_PASSWORD, MAIL_FROM, MAIL_SECURITY)

SITE_NAME = Setting(
    name="general.site_name",
    kind=str,
    default="Corral",
    title="Name of this installation in emails and authenticator apps",
    minimum=1,
    maximum=100,
    pattern=r"[^\x00-\x1f\x7f]*",
    accepts="without line breaks and other control characters",
)
_SIGN_IN: tuple[Setting[Any], ...] = (
    REGISTRATION,
    DEFAULT_ROLE,
    EMAIL_VERIFICATION,
    REQUIRE_MFA,
    REQUIRE_MFA_ROLES,
    ACCESS_TTL,
    REFRESH_IDLE,
    REFRESH_ABSOLUTE,
    REFRESH_GRACE,
    LOCKOUT_THRESHOLD,
    LOCKOUT_WINDOW,
    LOCKOUT_SECONDS,
    STEP_UP_SECONDS,
    MAX_SESSIONS,
    API_KEYS_ENABLED,
    API_KEY_DEFAULT_DAYS,
    API_KEY_MAX_DAYS,
    API_KEYS_PER_USER,
    MIN_LENGTH,
    BREACHED_CHECK,
    CONTEXT_WORDS,
    HISTORY,
    MAX_AGE_DAYS,
    REQUIRE_UPPER,
    REQUIRE_LOWER,
    REQUIRE_DIGIT,
    REQUIRE_SYMBOL,
    *MAIL,
)
SETTINGS = (
    SITE_NAME,
    TIMEZONE,
    # These settings determine who can sign in, also through mailed links.
    *(msgspec.structs.replace(setting, own_session=True) for setting in _SIGN_IN),
)
