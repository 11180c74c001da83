"""The manifest and the hook implementations of the `dead_letter` plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Setting, hookimpl
from corral_plugins.dead_letter import jobs, models, settings
from corral_plugins.dead_letter.api import DeadLetters, TaskDeadLettered
from corral_plugins.dead_letter.routes import routes
from corral_plugins.dead_letter.service.batches import DeadLetterBatches
from corral_plugins.dead_letter.service.letters import DeadLetterQueue, DeadLettersService
from corral_plugins.dead_letter.service.maintenance import DeadLetterMaintenance
from corral_plugins.dead_letter.service.metrics import DeadLetterMetrics, DeadLetterStatistics

if TYPE_CHECKING:
    import click


class DeadLetterPlugin(Plugin):
    """The dead letter queue, which contains the tasks that failed for good.

    Each failed task remains visible with the reason and the errors of its attempts. Admins can retry tasks one by one,
    or in batches at a rate that the workers can handle.
    """

    name = "dead_letter"
    requires = ("accounts", "tasks")
    wants = ("admin",)
    permissions = (
        Permission("dead_letter.read", "Read dead letters and their statistics"),
        Permission("dead_letter.write", "Add, retry and discard dead letters"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = DeadLetterMetrics()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (DeadLetterQueue, DeadLetterStatistics, DeadLetterBatches, DeadLetterMaintenance)
        return [
            Provide(DeadLetterMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(DeadLetters, DeadLettersService),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [TaskDeadLettered]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

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
        from corral_plugins.dead_letter.commands import dead_letter_command_group

        return [dead_letter_command_group]
