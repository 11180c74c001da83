"""The settings that the plugin `security` reads. The kernel declares them with their bounds and defaults."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting


def setting_handle(name: str, default: Any = None) -> Setting[Any]:
    """Return a handle for reading the setting `name`, which the kernel declares."""
    return Setting(name=name, kind=Any, default=default, title=name)


RATE, MACHINE_RATE, ANONYMOUS_RATE = (
    setting_handle("http.rate_per_minute"),
    setting_handle("http.machine_rate_per_minute"),
    setting_handle("http.anonymous_rate_per_minute"),
)
IN_FLIGHT = setting_handle("http.in_flight")
KEYS_ENABLED, KEY_DAYS, KEY_MAX_DAYS, KEYS_PER_USER = (
    setting_handle("security.api_keys_enabled"),
    setting_handle("security.api_key_default_days"),
    setting_handle("security.api_key_max_days"),
    setting_handle("security.api_keys_per_user"),
)
REQUIRE_MFA, REQUIRE_MFA_ROLES = setting_handle("security.require_mfa"), setting_handle("security.require_mfa_roles")
