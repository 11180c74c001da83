"""The sign-in policy and the password policy. Their fields are settings in the categories `security` and `password`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import Conflict, Unavailable
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.plugin import InstallationConfig, Settings
from corral.settings.store import SettingsStore
from corral_core.accounts.api import Accounts
from corral_plugins.security.api import SecurityChanged
from corral_plugins.security.models import ROW, IpModeRow
from corral_plugins.security.settings import REQUIRE_MFA, REQUIRE_MFA_ROLES, setting_handle
from corral_plugins.security.shapes import PasswordPolicyPatch, PasswordPolicyView, PolicyPatch, PolicyView

MAX_PASSWORD_LENGTH = 128
SECTIONS = {"security": PolicyPatch.__struct_fields__, "password": PasswordPolicyPatch.__struct_fields__}


class SecurityPolicies:
    """Reads and changes the policies. Every method runs in the caller's unit of work.

    Without the `settings` plugin, the policies are read-only.
    """

    store: SettingsStore | None = None

    def __init__(self, settings: Settings, accounts: Accounts, installation: InstallationConfig) -> None:
        self._settings, self._accounts, self._installation = settings, accounts, installation

    def get_policy(self) -> PolicyView:
        """Return the sign-in policy with warnings about the configuration."""
        values = self._section_values("security")
        mode = IpModeRow.select(IpModeRow.mode).where(IpModeRow.id == ROW).scalar()
        warnings = list(self._configuration_warnings(values))
        return PolicyView(**values, ip_mode=mode, warnings=warnings, version=self._section_version("security"))

    def get_password_policy(self) -> PasswordPolicyView:
        """Return the password policy."""
        values = self._section_values("password")
        return PasswordPolicyView(**values, max_length=MAX_PASSWORD_LENGTH, version=self._section_version("password"))

    def change_policy(self, patch: PolicyPatch, if_match: IfMatch, *, by: Principal) -> PolicyView:
        """Change the sign-in policy.

        Raise `Invalid` for an invalid value, `Conflict` (`setting_locked`) if a setting cannot be changed, or
        `Conflict` (`would_lock_out`) if the change would lock out the caller.
        """
        self._change_section("security", patch, if_match, by)
        return self.get_policy()

    def change_password_policy(
        self, patch: PasswordPolicyPatch, if_match: IfMatch, *, by: Principal
    ) -> PasswordPolicyView:
        """Change the password policy. The new policy applies the next time that a user changes their password."""
        self._change_section("password", patch, if_match, by)
        return self.get_password_policy()

    # -- internals

    def _change_section(self, section: str, patch: Any, if_match: IfMatch, by: Principal) -> None:
        if self.store is None:
            raise Unavailable(
                "The `settings` plugin is not active; enable it to change the policy.",
                code="plugin_disabled",
                retry_after=60,
            )
        given = msgspec.structs.asdict(patch)
        values = {f"{section}.{name}": value for name, value in given.items() if value is not msgspec.UNSET}
        changed = self.store.change(
            values,
            by=by,
            if_match=if_match,
            version_of=_setting_names(section),
            pointer=lambda name: f"/{name.partition('.')[2]}",
        )
        if changed.updated:
            fields = sorted(name.partition(".")[2] for name in changed.updated)
            emit(SecurityChanged(section=section, changed=fields), object=("security", section))

    def register_checks(self) -> None:
        """Register the check that prevents admins from locking themselves out by changing a policy.

        The check also runs when the settings are changed through `/settings`.
        """
        if self.store is not None:
            self.store.add_check([REQUIRE_MFA, REQUIRE_MFA_ROLES], self._check_author_has_mfa)

    def _check_author_has_mfa(self, values: Settings, by: Principal) -> None:
        """Reject a change that requires a second factor if the author of the change has none."""
        if not values.get(REQUIRE_MFA) or by.role not in values.get(REQUIRE_MFA_ROLES) or by.user_id is None:
            return
        if not self._accounts.get(by.user_id).mfa_enabled:
            detail = (
                "You have no second factor and would lock yourself out; first run `corral api POST /auth/mfa/setup`."
            )
            raise Conflict(detail, code="would_lock_out")

    def _section_values(self, section: str) -> dict[str, Any]:
        values = self._current_settings()
        return {name: values.get(setting_handle(f"{section}.{name}")) for name in SECTIONS[section]}

    def _current_settings(self) -> Settings:
        return self._settings if self.store is None else self.store.values()

    def _section_version(self, section: str) -> int:
        return 1 if self.store is None else self.store.version(_setting_names(section))

    def _configuration_warnings(self, values: dict[str, Any]) -> Iterator[Any]:
        here = self._installation
        found = {
            "registration_open_on_public_bind": here.is_public and values["registration"] == "open",
            "rate_limits_off": not here.rate_limits,
            "metrics_open": here.is_public and here.metrics_token is None,
            "key_in_data_dir": here.key_in_data_dir,
            "ip_rules_disabled": here.ip_rules_disabled,
        }
        return (name for name, holds in found.items() if holds)


def _setting_names(section: str) -> list[str]:
    return [f"{section}.{name}" for name in SECTIONS[section]]
