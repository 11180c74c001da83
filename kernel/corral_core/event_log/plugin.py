"""The manifest and the hook implementations of the `event_log` plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.visibility import EventRights
from corral.events.event import Event, SystemAlert
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Contributions, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_core.event_log.jobs import SCHEDULES, consumer_lag
from corral_core.event_log.routes import routes
from corral_core.event_log.service import EventRightsService
from corral_core.event_log.settings import SETTINGS

if TYPE_CHECKING:
    import click


class EventLogPlugin(Plugin):
    """Event log: provides read access to events, decides who may read them, and deletes old events and jobs."""

    name = "event_log"
    protected = True
    prefixes = ("events", "jobs")

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._consumers: list[str] = []

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(EventRightsService, EventRightsService), Provide(EventRights, _event_rights)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_core.event_log.command import events_command

        return [events_command]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [SystemAlert]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        lag = Metric(
            name="corral_event_consumer_lag",
            help="Number of events that each consumer has not processed yet.",
            labels={"consumer": self._consumers},
            collect=consumer_lag,
        )
        return [lag]

    async def start(self, runtime: Runtime) -> None:
        """Collect the names of all event consumers, which become the values of the metric label `consumer`."""
        self._consumers[:] = [item.name for _, item in runtime.service(Contributions).for_hook("corral_subscribers")]


def _event_rights(service: EventRightsService) -> EventRights:
    return service
