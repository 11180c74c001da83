"""The `marketplace` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Metric, Plugin, Provide, Setting, hookimpl
from corral_marketplace import catalogue
from corral_plugins.marketplace import hookspecs, jobs, models, settings
from corral_plugins.marketplace.api import EVENTS, TemplateSource
from corral_plugins.marketplace.routes import routes
from corral_plugins.marketplace.service.catalogue import TemplateCatalogue
from corral_plugins.marketplace.service.exporting import TemplateExport
from corral_plugins.marketplace.service.installations import Installations
from corral_plugins.marketplace.service.installing import InstallationService
from corral_plugins.marketplace.service.metrics import MarketplaceMetrics
from corral_plugins.marketplace.service.remote_index import RemoteIndex
from corral_plugins.marketplace.service.requirements import Requirements
from corral_plugins.marketplace.service.upgrading import UpgradeService
from corral_plugins.marketplace.service.uploads import TemplateUploads

if TYPE_CHECKING:
    import click

PARTS = (
    TemplateCatalogue,
    Requirements,
    InstallationService,
    Installations,
    UpgradeService,
    TemplateUploads,
    TemplateExport,
    RemoteIndex,
)


class MarketplacePlugin(Plugin):
    """The marketplace, which offers templates for agent teams.

    Before an installation, people see exactly what a template would create and which resources it may use. The template
    is installed in one transaction. People can later upgrade or remove the installation, and can create templates from
    their own objects.
    """

    name = "marketplace"
    requires = ("accounts",)
    wants = ("secrets", "tools")
    permissions = (
        Permission("marketplace.read", "Read templates and installations", holders=READERS),
        Permission(
            "marketplace.write", "Install and export templates; change one's own installations", holders=WRITERS
        ),
        Permission("marketplace.manage", "Upload and delete templates, and change all installations"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = MarketplaceMetrics()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(MarketplaceMetrics, lambda: self._metrics), *(Provide(part, part) for part in PARTS)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return [settings.INDEX_URL]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [Schedule("marketplace.index", 3600, jobs.refresh_index)]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.marketplace.commands import template_command_group

        return [template_command_group]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl(optionalhook=True)
    def corral_template_sources(self) -> Iterable[TemplateSource]:
        return [TemplateSource(name="bundled", manifests=catalogue.manifests)]
