"""The manifest and the hook implementations of the `admin` plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from corral.auth.principal import ROLES, Permission
from corral.database.model import Model
from corral.http.routes import Routes
from corral.plugin import Metric, Plugin, Provide, hookimpl
from corral_core.accounts.api import Accounts
from corral_core.backup.api import RestoreStep
from corral_plugins.admin.api import KillSwitch
from corral_plugins.admin.models import KillSwitchRow
from corral_plugins.admin.routes import kill_switch, users
from corral_plugins.admin.service.kill_switch import KillSwitchService
from corral_plugins.admin.service.users import UserAdministration

if TYPE_CHECKING:
    import click


class AdminPlugin(Plugin):
    """Administration: user accounts and their permissions, and the kill switch."""

    name = "admin"
    requires = ("accounts",)
    wants = ("backup", "security", "tasks")
    protected = True
    permissions = (
        Permission("admin.read", "View all accounts"),
        Permission("admin.write", "Change accounts"),
        Permission("admin.kill_switch", "Stop all agent activity"),
    )

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(KillSwitchService, KillSwitchService),
            Provide(KillSwitch, _provide_kill_switch),
            Provide(UserAdministration, UserAdministration),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [users.routes, kill_switch.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [KillSwitchRow]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.admin.command import kill_switch_command
        from corral_plugins.admin.invitation_commands import invitations_command_group

        return [invitations_command_group, kill_switch_command]

    @hookimpl(optionalhook=True)
    def corral_restore_steps(self) -> Iterable[type[RestoreStep]]:
        return [KillSwitchService]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_kill_switch",
                help="State of the kill switch: 1 if engaged, 0 if released.",
                collect=_kill_switch_state,
            ),
            Metric(
                name="corral_users",
                help="Number of accounts by role and state.",
                collect=_users_by_role,
                labels={"role": ROLES, "state": ("active", "deactivated")},
            ),
        ]


def _provide_kill_switch(service: KillSwitchService) -> KillSwitch:
    return service


def _kill_switch_state(switch: KillSwitchService) -> Mapping[tuple[str, ...], float]:
    return {(): float(switch.state().engaged)}


def _users_by_role(accounts: Accounts) -> Mapping[tuple[str, ...], float]:
    return {
        (role, "active" if active else "deactivated"): float(count)
        for (role, active), count in accounts.count_by_role().items()
    }
