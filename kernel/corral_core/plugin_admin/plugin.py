"""The manifest and the hook implementations of the `plugin_admin` plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from corral.auth.principal import Permission
from corral.database.engine import Work
from corral.database.model import Model
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.plugin import ApiDocument, InstallationConfig, Plugin, Provide, Runtime, hookimpl
from corral_core.plugin_admin.api import PluginStateChanged
from corral_core.plugin_admin.models import PluginStateRow, QuarantineRow
from corral_core.plugin_admin.routes import docs, plugins
from corral_core.plugin_admin.service.failure_alerts import FailureAlerts
from corral_core.plugin_admin.service.openapi import OpenApiDocument
from corral_core.plugin_admin.service.plugins import PluginAdministration, safe_mode_alert
from corral_core.plugin_admin.service.quarantine import QuarantineSync
from corral_core.plugin_admin.service.schedules import ScheduleAdministration
from corral_core.plugin_admin.service.thread_exceptions import ThreadExceptions


class PluginAdminPlugin(Plugin):
    """Plugin administration: enabling and disabling plugins, plugin quarantine, and the API documentation."""

    name = "plugin_admin"
    protected = True
    prefixes = ("plugins",)
    permissions = (
        Permission("plugins.read", "View plugins, their states and errors"),
        Permission("plugins.write", "Enable and disable plugins, and run their schedules"),
    )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._stop: list[Callable[[], object]] = []

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(PluginAdministration, PluginAdministration),
            Provide(ScheduleAdministration, ScheduleAdministration),
            Provide(QuarantineSync, QuarantineSync),
            Provide(FailureAlerts, FailureAlerts),
            Provide(ThreadExceptions, ThreadExceptions),
            Provide(ApiDocument, OpenApiDocument),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [docs.routes, plugins.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [PluginStateRow, QuarantineRow]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [PluginStateChanged]

    async def start(self, runtime: Runtime) -> None:
        """Apply the stored states of all plugins, and keep applying changes made by other processes."""
        work, feed = runtime.service(Work), runtime.service(Feed)
        plugins, quarantine = runtime.service(PluginAdministration), runtime.service(QuarantineSync)
        if runtime.service(InstallationConfig).safe_mode:
            await work(safe_mode_alert)
        plugins.apply_decisions(await work(plugins.disabled_by_admins, read=True))
        quarantine.apply_rows(await work(quarantine.stored_rows, read=True))
        runtime.supervise("plugin_states", plugins.apply_changes)
        runtime.supervise("quarantine", quarantine.synchronize_regularly)
        runtime.supervise("failure_alerts", runtime.service(FailureAlerts).raise_for_failures)
        threads = runtime.service(ThreadExceptions)
        threads.start()
        self._stop = [threads.stop, feed.watch(plugins.on_events), feed.watch(quarantine.on_events)]

    async def stop(self) -> None:
        for stop in self._stop:
            stop()
