"""The manifest and the hook implementations of the `circuit_breakers` plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.circuit_breakers import jobs, models, settings
from corral_plugins.circuit_breakers.api import EVENTS, Breakers
from corral_plugins.circuit_breakers.routes import routes
from corral_plugins.circuit_breakers.service.administration import BreakerAdministration
from corral_plugins.circuit_breakers.service.breakers import BreakersService
from corral_plugins.circuit_breakers.service.configuration import BreakerDefaults, GuardedNames
from corral_plugins.circuit_breakers.service.metrics import BreakerMetrics
from corral_plugins.circuit_breakers.service.transitions import BreakerTransitions

if TYPE_CHECKING:
    import click

SHOWN = 3  # breakers in the sentence of the health check


class CircuitBreakersPlugin(Plugin):
    """Circuit breakers.

    A circuit breaker stops the calls to a failing system, admits a few calls after a while, and closes if they succeed.
    All processes share its state. Admins can see why a breaker is open, configure it and force it open or closed.
    """

    name = "circuit_breakers"
    permissions = (
        Permission("circuit_breakers.read", "View circuit breakers and their transitions"),
        Permission("circuit_breakers.write", "Configure, force and reset circuit breakers"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = BreakerMetrics()
        self._breakers: BreakersService | None = None
        self._unwatch: Callable[[], None] = lambda: None

    async def start(self, runtime: Runtime) -> None:
        """Load the states of all circuit breakers before any call is guarded."""
        self._breakers = runtime.service(BreakersService)
        await self._breakers.sync()
        self._unwatch = runtime.service(Feed).watch(self._breakers.on_events)
        runtime.supervise("circuit breakers", self._breakers.run)

    async def stop(self) -> None:
        self._unwatch()
        if self._breakers is not None:
            await self._breakers.stop()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (GuardedNames, BreakerDefaults, BreakerTransitions, BreakersService, BreakerAdministration)
        return [
            Provide(BreakerMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Breakers, _provide_breakers),
        ]

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
        return settings.ALL

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("circuit_breakers", self._check_states)]

    def _check_states(self) -> tuple[str, str]:
        found = self._breakers.open_breakers() if self._breakers is not None else {}
        if not found:
            return "ok", "All circuit breakers are closed."
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(found.items())[:SHOWN])
        told = "1 circuit breaker is" if len(found) == 1 else f"{len(found)} circuit breakers are"
        return "degraded", f"{told} not closed. {shown}"

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.circuit_breakers.command import circuit_breakers_command_group

        return [circuit_breakers_command_group]


def _provide_breakers(service: BreakersService) -> Breakers:
    return service
