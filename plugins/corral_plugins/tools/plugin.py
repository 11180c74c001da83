"""The plugin `tools`: its manifest and what it contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.egress.client import Egress
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, Settings, hookimpl
from corral_plugins.tools import hookspecs, jobs, models, routes, settings
from corral_plugins.tools.api import Tool, Tools
from corral_plugins.tools.service.calls import Calls
from corral_plugins.tools.service.cases import Cases
from corral_plugins.tools.service.catalogue import Catalogue
from corral_plugins.tools.service.executions import Executions
from corral_plugins.tools.service.figures import DECISIONS, Figures
from corral_plugins.tools.service.header_secrets import HeaderSecrets
from corral_plugins.tools.service.permits import Permits
from corral_plugins.tools.service.records import Records
from corral_plugins.tools.service.registry import Registry
from corral_plugins.tools.service.tools import ToolsService
from corral_plugins.tools.service.web import Web
from corral_plugins.tools.shapes import ToolCalled


class ToolsPlugin(Plugin):
    """Tools: what agents may do besides talking.

    Every call passes one decision at the moment of execution, is bound to the person it is done for, and is on record.
    """

    name = "tools"
    requires = ("accounts",)
    wants = ("admin", "agents", "secrets", "tasks", "workers")
    permissions = (
        Permission("tools.read", "See tools and their calls", holders=(*READERS, "agent")),
        Permission("tools.use_external", "Have agents fetch and send outside of Corral", holders=WRITERS),
        Permission("tools.use_dangerous", "Have agents run code, shells and machines", holders=WRITERS),
        Permission("tools.manage", "Change policies, risks and configuration of tools"),
        Permission("tools.act", "Call tools under a lease", holders=("worker", "agent")),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._figures, self._web = Figures(), Web()
        self._executions: Executions | None = None
        self._asks_when_tainted: Callable[[], bool] = lambda: True

    async def start(self, runtime: Runtime) -> None:
        declared: Settings = runtime.service(Settings)
        self._asks_when_tainted = lambda: declared.get(settings.TAINT_ENABLED)
        self._web.bind(runtime.service(Egress), runtime.service(HeaderSecrets))
        self._executions = runtime.service(Executions)
        registry = runtime.service(Registry)
        registry.warn()
        self._figures.names[:] = sorted(registry.contributed())

    async def stop(self) -> None:
        if self._executions is not None:
            await self._executions.stop()
        await self._web.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (Registry, Cases, Executions, HeaderSecrets, Permits, Calls, Catalogue, Records)
        return [
            Provide(Figures, lambda: self._figures),
            *(Provide(part, part) for part in parts),
            Provide(Tools, ToolsService),
        ]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl
    def corral_tools(self) -> Iterable[Tool]:
        return self._web.all()

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.registry, routes.calls, routes.lease]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [ToolCalled]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("tools.tasks", ("task.deleted",), jobs.forget_task)]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job("tools.forget_task", jobs.go_on_forgetting)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("tools", self._health)]

    def _health(self) -> tuple[str, str]:
        if self._asks_when_tainted():
            return "ok", "Runs that received untrusted content ask before they act outside."
        return "degraded", "Runs that received untrusted content act unasked (tools.taint_enabled is off)."

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        tools, seen = {"tool": self._figures.names}, self._figures
        return [
            Metric(
                name="corral_tool_calls_total",
                help="Tool calls, by decision.",
                kind="counter",
                labels={**tools, "decision": DECISIONS},
                collect=seen.calls,
            ),
            Metric(
                name="corral_tool_seconds",
                help="Time that tool calls took.",
                kind="histogram",
                labels=tools,
                collect=seen.seconds.read,
            ),
            Metric(
                name="corral_tainted_attempts_total",
                help="Attempts that received untrusted content.",
                kind="counter",
                collect=seen.tainted_attempts,
            ),
        ]
