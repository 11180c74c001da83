"""The plugin `workers`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from corral.auth.principal import READERS, WRITERS, Authenticator, Permission
from corral.database.engine import Database
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.tools.api import Tool
from corral_plugins.workers import jobs, models, settings
from corral_plugins.workers.api import EVENTS, Workers
from corral_plugins.workers.node.tools.names import ToolName
from corral_plugins.workers.routes import ROUTES
from corral_plugins.workers.service import fleet
from corral_plugins.workers.service.administration import Administration
from corral_plugins.workers.service.claims import REASONS, ClaimFigures, Claims
from corral_plugins.workers.service.embedded import EmbeddedLease, Program
from corral_plugins.workers.service.fleet import Fleet
from corral_plugins.workers.service.heartbeats import Heartbeats
from corral_plugins.workers.service.keys import Keys
from corral_plugins.workers.service.leases import WorkerLeases
from corral_plugins.workers.service.presence import Presence
from corral_plugins.workers.service.registration import Registrations
from corral_plugins.workers.service.roster import Roster
from corral_plugins.workers.service.sweeps import Sweeps
from corral_plugins.workers.service.tokens import RegistrationKeys, WorkerTokens
from corral_plugins.workers.tools import contributed

if TYPE_CHECKING:
    import click


class WorkersConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`embedded`: start a worker beside the server, for up to `embedded_max_agents` tasks at a time.

    `embedded_allow`: tools of the server's machine that agents may use there, with the rights of the server's user.
    """

    embedded: bool = True
    embedded_max_agents: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    embedded_allow: list[ToolName] = []


class WorkersPlugin(Plugin):
    """Workers: the machines that run agents.

    They register, ask for work over HTTP, do it under a lease and report; admins approve and drain them.
    """

    name = "workers"
    requires = ("accounts",)
    wants = ("tasks", "tools")
    config = WorkersConfig
    permissions = (
        Permission("workers.read", "See workers", holders=READERS),
        Permission("workers.register", "Register workers", holders=(*WRITERS, "registration_key")),
        Permission("workers.act", "Claim and report as a worker", holders=("worker",)),
        Permission("workers.manage", "Approve, change and remove workers"),
    )

    def __init__(self, section: WorkersConfig | None = None) -> None:
        super().__init__(section or WorkersConfig())
        self._claims = ClaimFigures()
        self._health: Callable[[], tuple[str, str]] = lambda: ("disabled", "The server is starting.")
        self._queue_health = self._health

    async def start(self, runtime: Runtime) -> None:
        database, seen = runtime.service(Database), runtime.service(Fleet)
        self._health = lambda: database.run(seen.health, read=True)
        self._queue_health = lambda: database.run(seen.queue_health, read=True)
        runtime.supervise("presence", runtime.service(Presence).run)
        if self.section.embedded:
            runtime.when_serving(lambda address: self._start_embedded(runtime, address))

    async def _start_embedded(self, runtime: Runtime, address: str) -> None:
        work, registrations = runtime.service(Database).work, runtime.service(Registrations)

        def make_key() -> Awaitable[str]:
            return work(registrations.embedded_key)

        def begin() -> Program:
            from corral_plugins.workers.node.embedded import EmbeddedWorker

            section = self.section
            return EmbeddedWorker(address, make_key, section.embedded_max_agents, allow=section.embedded_allow)

        embedded = EmbeddedLease(work, begin)
        runtime.when_draining(embedded.close)
        runtime.supervise("embedded", embedded.run)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ClaimFigures, lambda: self._claims),
            Provide(Workers, Roster),
            *(
                Provide(kind, kind)
                for kind in (
                    Presence,
                    WorkerLeases,
                    Registrations,
                    Heartbeats,
                    Claims,
                    Administration,
                    Fleet,
                    Keys,
                    Sweeps,
                )
            ),
        ]

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [WorkerTokens, RegistrationKeys]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.MODELS

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return ROUTES

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
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [
            HealthCheck("workers", lambda: self._health()),
            HealthCheck("queue", lambda: self._queue_health()),
        ]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_workers",
                help="Workers by state.",
                labels={"status": fleet.STATUSES},
                collect=fleet.by_status,
            ),
            Metric(name="corral_worker_capacity", help="Leases that online workers may hold.", collect=fleet.capacity),
            Metric(name="corral_worker_leases", help="Leases that workers hold.", collect=fleet.leases),
            Metric(
                name="corral_claims_total",
                help="Answered claims.",
                kind="counter",
                labels={"reason": REASONS},
                collect=self._claims_by_reason,
            ),
            Metric(
                name="corral_claim_seconds",
                help="Time that answered claims took.",
                kind="histogram",
                collect=self._claims.seconds.read,
            ),
        ]

    def _claims_by_reason(self) -> Mapping[tuple[str, ...], float]:
        return {(reason,): float(self._claims.answers[reason]) for reason in REASONS}

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return contributed()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.workers.node.command import command

        return [command]
