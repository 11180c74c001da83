"""Run-time settings and permissions that `core` reads and asks for."""

from __future__ import annotations

from corral.auth.principal import Permission
from corral.plugin import Setting

HOUR, DAY = 3600, 86_400

REGISTRATION = Setting(
    name="security.registration", kind=str, default="open", title="Who may register",
    choices=("open", "invite", "closed"),
)  # fmt: skip
DEFAULT_ROLE = Setting(
    name="security.default_role", kind=str, default="member", title="Role of new accounts", choices=("member", "viewer")
)
ACCESS_TTL = Setting(
    name="security.access_ttl_seconds", kind=int, default=900, title="Life of access tokens", minimum=60, maximum=HOUR
)
REFRESH_IDLE = Setting(
    name="security.refresh_idle_seconds", kind=int, default=7 * DAY, title="Idle time that ends a session",
    minimum=HOUR, maximum=30 * DAY,
)  # fmt: skip
REFRESH_ABSOLUTE = Setting(
    name="security.refresh_absolute_seconds", kind=int, default=30 * DAY, title="Longest life of a session",
    minimum=HOUR, maximum=90 * DAY,
)  # fmt: skip
REFRESH_GRACE = Setting(
    name="security.refresh_grace_seconds", kind=int, default=10, minimum=0, maximum=60,
    title="Time in which a used refresh token gives the same successor again",
)  # fmt: skip
MAX_SESSIONS = Setting(
    name="security.max_sessions_per_user", kind=int, default=20, title="Sessions of one user; the oldest ends",
    minimum=1, maximum=100,
)  # fmt: skip
MIN_LENGTH = Setting(
    name="password.min_length", kind=int, default=12, title="Least length of a password", minimum=8, maximum=64
)
CONTEXT_WORDS = Setting[list[str]](
    name="password.context_words", kind=list[str], default=[], title="Words that no password may contain"
)
REQUIRE_UPPER = Setting(name="password.require_upper", kind=bool, default=False, title="Ask for an upper-case letter")
REQUIRE_LOWER = Setting(name="password.require_lower", kind=bool, default=False, title="Ask for a lower-case letter")
REQUIRE_DIGIT = Setting(name="password.require_digit", kind=bool, default=False, title="Ask for a digit")
REQUIRE_SYMBOL = Setting(name="password.require_symbol", kind=bool, default=False, title="Ask for a symbol")
CORS_ORIGINS = Setting[list[str]](
    name="http.cors_origins", kind=list[str], default=[], title="Origins of other web applications that may call"
)
RETENTION_DAYS = Setting(
    name="events.retention_days", kind=int, default=30, title="Days that events are kept", minimum=1, maximum=365
)
MAX_ROWS = Setting(
    name="events.max_rows", kind=int, default=1_000_000, title="Events that are kept",
    minimum=10_000, maximum=50_000_000,
)  # fmt: skip
JOBS_RETENTION_DAYS = Setting(
    name="jobs.retention_days", kind=int, default=7, title="Days that ended jobs are kept", minimum=1, maximum=90
)

SETTINGS = (
    REGISTRATION, DEFAULT_ROLE, ACCESS_TTL, REFRESH_IDLE, REFRESH_ABSOLUTE, REFRESH_GRACE, MAX_SESSIONS,
    MIN_LENGTH, CONTEXT_WORDS, REQUIRE_UPPER, REQUIRE_LOWER, REQUIRE_DIGIT, REQUIRE_SYMBOL,
    CORS_ORIGINS, RETENTION_DAYS, MAX_ROWS, JOBS_RETENTION_DAYS,
)  # fmt: skip

PERMISSIONS = (
    Permission("plugins.read", "See plugins, their states and errors"),
    Permission("plugins.write", "Take plugins out of service and back"),
    Permission("settings.read", "See settings, health and the rules for connections to the outside"),
)
