"""The `triggers` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.marketplace.api import Installer
from corral_plugins.triggers import hookspecs, jobs, models, routes, settings
from corral_plugins.triggers.api import EVENTS, EventTaint
from corral_plugins.triggers.service.event_reader import TriggerEvents, TriggerLogReader
from corral_plugins.triggers.service.firing import TriggerFiring
from corral_plugins.triggers.service.ingress import TriggerIngress
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.management import TriggerManagement
from corral_plugins.triggers.service.metrics import TriggerMetrics
from corral_plugins.triggers.service.previews import TriggerPreviews
from corral_plugins.triggers.service.scheduler import TriggerScheduler, TriggerTimes
from corral_plugins.triggers.service.slots import TriggerSlots
from corral_plugins.triggers.service.taint import EventTaintService
from corral_plugins.triggers.service.template_installer import TriggerTemplateInstaller
from corral_plugins.triggers.service.validation import TriggerChecks

if TYPE_CHECKING:
    import click


class TriggersPlugin(Plugin):
    """Triggers, which start work at a set time, on an event or webhook request, or when an expected event is missing.

    Each slot of a trigger (an occasion on which it is due) fires only once, even if several processes run. The history
    contains every slot that fired, was skipped or failed.
    """

    name = "triggers"
    requires = ("accounts", "event_log", "expressions")
    wants = ("admin", "marketplace", "security")
    permissions = (
        Permission("triggers.read", "Read triggers and their history", holders=READERS),
        Permission("triggers.write", "Create triggers; change and fire one's own triggers", holders=WRITERS),
        Permission("triggers.manage", "Change and fire all triggers"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = TriggerMetrics()
        self._template_installer = TriggerTemplateInstaller()

    async def start(self, runtime: Runtime) -> None:
        await runtime.service(TriggerLogReader).create_position()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (
            TriggerTypeRegistry,
            TriggerSlots,
            TriggerChecks,
            TriggerTimes,
            TriggerFiring,
            TriggerScheduler,
            TriggerEvents,
            TriggerLogReader,
            TriggerManagement,
            TriggerIngress,
            TriggerPreviews,
        )
        return [
            Provide(TriggerMetrics, lambda: self._metrics),
            Provide(TriggerTemplateInstaller, lambda: self._template_installer),
            *(Provide(part, part) for part in parts),
            Provide(EventTaint, EventTaintService),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.routes, routes.ingress_routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.triggers.commands import triggers_command_group

        return [triggers_command_group]

    @hookimpl(optionalhook=True)
    def corral_template_installers(self) -> Iterable[Installer]:
        return [self._template_installer.definition()]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]
