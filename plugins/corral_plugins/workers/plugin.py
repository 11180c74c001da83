"""The `workers` plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from corral_plugins.workers.node.tools.builtin import ToolName
from corral_plugins.workers.routes import ROUTES
from corral_plugins.workers.service import embedded, fleet
from corral_plugins.workers.service.administration import WorkerAdministration
from corral_plugins.workers.service.authentication import RegistrationKeyAuthenticator, WorkerTokenAuthenticator
from corral_plugins.workers.service.fleet import Fleet
from corral_plugins.workers.service.liveness import WorkerLiveness, WorkerSweeps
from corral_plugins.workers.service.protocol import CLAIM_REASONS, ClaimMetrics, WorkerProtocol
from corral_plugins.workers.service.registration import RegistrationKeys, WorkerRegistration
from corral_plugins.workers.service.registry import WorkersService
from corral_plugins.workers.service.worker_tools import reference_worker_tools

if TYPE_CHECKING:
    import click

SERVICES = (
    WorkerLiveness,
    WorkerRegistration,
    RegistrationKeys,
    WorkerProtocol,
    WorkerAdministration,
    Fleet,
    WorkerSweeps,
)


class WorkersConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The configuration section of the `workers` plugin.

    If `embedded` is true, the server starts its own worker, the embedded worker. `embedded_max_agents` is the number of
    tasks that the embedded worker runs at the same time. `embedded_allow` lists the tools that agents may run on the
    server's machine with the privileges of the server's operating system user.
    """

    embedded: bool = True
    embedded_max_agents: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    embedded_allow: list[ToolName] = []


class WorkersPlugin(Plugin):
    """Workers: the machines that run agents.

    Workers register, claim tasks over HTTP, run the tasks under a lease and report the results. Admins approve and
    drain workers.
    """

    name = "workers"
    requires = ("accounts",)
    wants = ("tasks", "tools")
    config = WorkersConfig
    permissions = (
        Permission("workers.read", "View workers", holders=READERS),
        Permission("workers.register", "Register workers", holders=(*WRITERS, "registration_key")),
        Permission("workers.act", "Claim tasks and report as a worker", holders=("worker",)),
        Permission("workers.manage", "Approve, change and delete workers"),
    )

    def __init__(self, section: WorkersConfig | None = None) -> None:
        super().__init__(section or WorkersConfig())
        self._claims = ClaimMetrics()
        self._health: Callable[[], tuple[str, str]] = lambda: ("disabled", "The server is starting; try again.")
        self._queue_health = self._health

    async def start(self, runtime: Runtime) -> None:
        database, checked, section = runtime.service(Database), runtime.service(Fleet), self.section
        self._health = lambda: database.run(checked.workers_health, read=True)
        self._queue_health = lambda: database.run(checked.queue_health, read=True)
        runtime.supervise("liveness", runtime.service(WorkerLiveness).write_regularly)

        async def start_embedded(address: str) -> None:
            max_agents, allow = section.embedded_max_agents, section.embedded_allow
            embedded.start_embedded(runtime, address, max_agents=max_agents, allow=allow)

        if section.embedded:
            runtime.when_serving(start_embedded)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ClaimMetrics, lambda: self._claims),
            Provide(Workers, WorkersService),
            *(Provide(kind, kind) for kind in SERVICES),
        ]

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [WorkerTokenAuthenticator, RegistrationKeyAuthenticator]

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
                help="Number of workers by status.",
                labels={"status": fleet.STATUSES},
                collect=fleet.workers_by_status,
            ),
            Metric(
                name="corral_worker_capacity",
                help="Maximum number of leases that all online workers together can hold.",
                collect=fleet.lease_capacity,
            ),
            Metric(name="corral_worker_leases", help="Number of leases that workers hold.", collect=fleet.lease_count),
            Metric(
                name="corral_claims_total",
                help="Number of answered claim requests, by result (the field reason of the response).",
                kind="counter",
                labels={"reason": CLAIM_REASONS},
                collect=self._claims.by_reason,
            ),
            Metric(
                name="corral_claim_seconds",
                help="Duration of answered claim requests, in seconds.",
                kind="histogram",
                collect=self._claims.seconds.read,
            ),
        ]

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return reference_worker_tools()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.workers.commands import workers_command_group
        from corral_plugins.workers.node.command import worker_command

        return [worker_command, workers_command_group]
