"""The rate-limit settings that the `security` plugin declares, and the settings of `accounts` that it reads."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting


def setting_handle(name: str, default: Any = None) -> Setting[Any]:
    """Return a handle for reading the setting `name`, which the `accounts` plugin declares."""
    return Setting(name=name, kind=Any, default=default, title=name)


IN_FLIGHT = Setting(
    name="http.in_flight",
    own_session=True,
    kind=int,
    title="Maximum number of concurrent requests per caller",
    default=60,
    minimum=1,
    maximum=1000,
)
RATE = Setting(
    name="http.rate_per_minute",
    own_session=True,
    kind=int,
    title="Maximum requests per minute of a user or API key",
    default=1200,
    minimum=10,
    maximum=100_000,
)
MACHINE_RATE = Setting(
    name="http.machine_rate_per_minute",
    own_session=True,
    kind=int,
    title="Maximum requests per minute of a worker or agent",
    default=12_000,
    minimum=100,
    maximum=1_000_000,
)
ANONYMOUS_RATE = Setting(
    name="http.anonymous_rate_per_minute",
    own_session=True,
    kind=int,
    title="Maximum requests per minute from a client address without a credential",
    default=120,
    minimum=10,
    maximum=100_000,
)
SETTINGS = (RATE, MACHINE_RATE, ANONYMOUS_RATE, IN_FLIGHT)

KEYS_ENABLED, KEY_DAYS, KEY_MAX_DAYS, KEYS_PER_USER = (
    setting_handle("security.api_keys_enabled"),
    setting_handle("security.api_key_default_days"),
    setting_handle("security.api_key_max_days"),
    setting_handle("security.api_keys_per_user"),
)
REQUIRE_MFA, REQUIRE_MFA_ROLES = setting_handle("security.require_mfa"), setting_handle("security.require_mfa_roles")
