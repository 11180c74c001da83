"""The manifest and the hook implementations of the `settings` plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes
from corral.plugin import Metric, Plugin, Provide, Runtime, hookimpl
from corral.settings.store import SettingsStore
from corral_plugins.settings.api import SettingChanged
from corral_plugins.settings.models import TABLES
from corral_plugins.settings.routes import routes
from corral_plugins.settings.service.effective import EffectiveSettings
from corral_plugins.settings.service.reloading import LiveSettings
from corral_plugins.settings.service.store import SettingsService
from corral_plugins.settings.service.views import SettingViews

if TYPE_CHECKING:
    import click


class SettingsPlugin(Plugin):
    """Settings: values that admins can change at run time.

    Values are validated before they are stored, take effect in every process within 2 s, and can be reset.
    """

    name = "settings"
    requires = ("accounts",)
    protected = True
    starts_first = True  # so that stored settings are in effect before other plugins read them
    permissions = (Permission("settings.write", "Change settings"),)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._live: LiveSettings | None = None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(EffectiveSettings, EffectiveSettings),
            Provide(SettingsService, SettingsService),
            Provide(SettingsStore, _provide_settings_store),
            Provide(SettingViews, SettingViews),
            Provide(LiveSettings, LiveSettings),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [SettingChanged]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.settings.commands import settings_command_group

        return [settings_command_group]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_settings_version",
                help="Version of the stored settings. It increases with every change.",
                collect=_collect_settings_version,
            ),
            Metric(
                name="corral_settings_invalid",
                help="Number of stored values that are ignored because they are invalid.",
                collect=_collect_invalid_values,
            ),
        ]

    async def start(self, runtime: Runtime) -> None:
        """Apply the stored values before any other code in this process reads a setting."""
        self._live = runtime.service(LiveSettings)
        await self._live.apply_newer_values()
        runtime.supervise("follow", self._live.poll_changes)

    async def stop(self) -> None:
        if self._live is not None:
            await self._live.delete_outdated_record()


def _provide_settings_store(service: SettingsService) -> SettingsStore:
    return service


def _collect_settings_version(effective: EffectiveSettings) -> Mapping[tuple[str, ...], float]:
    return {(): float(max(0, effective.version))}


def _collect_invalid_values(effective: EffectiveSettings) -> Mapping[tuple[str, ...], float]:
    return {(): float(sum(item.problem is not None for item in effective.current))}
