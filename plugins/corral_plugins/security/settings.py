"""The settings that the plugin `security` reads. The kernel declares them with their bounds and defaults."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting


def named(name: str, default: Any = None) -> Setting[Any]:
    """Return a handle for reading the setting `name`, which the kernel declares."""
    return Setting(name=name, kind=Any, default=default, title=name)


RATE, MACHINE_RATE, ANONYMOUS_RATE = (
    named("http.rate_per_minute"),
    named("http.machine_rate_per_minute"),
    named("http.anonymous_rate_per_minute"),
)
IN_FLIGHT = named("http.in_flight")
KEYS_ENABLED, KEY_DAYS, KEY_MAX_DAYS, KEYS_PER_USER = (
    named("security.api_keys_enabled"),
    named("security.api_key_default_days"),
    named("security.api_key_max_days"),
    named("security.api_keys_per_user"),
)
REQUIRE_MFA, REQUIRE_MFA_ROLES = named("security.require_mfa"), named("security.require_mfa_roles")
