"""The `tools` plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.egress.client import Egress
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, Settings, hookimpl
from corral_plugins.tools import hookspecs, jobs, models, routes, settings
from corral_plugins.tools.api import Tool, ToolCalled, Tools
from corral_plugins.tools.service.call_permits import ToolPermits
from corral_plugins.tools.service.calls import CallHistory, ToolCalls
from corral_plugins.tools.service.decision import ContextBuilder
from corral_plugins.tools.service.executions import ToolExecutions
from corral_plugins.tools.service.held_call_outcomes import HeldResults
from corral_plugins.tools.service.held_calls import JOB, HeldCalls
from corral_plugins.tools.service.http_tools import HeaderSecrets, HostBreakers, HttpTools
from corral_plugins.tools.service.listing import ToolListing
from corral_plugins.tools.service.mcp.connections import McpConnections
from corral_plugins.tools.service.mcp.refresh import McpRefresh
from corral_plugins.tools.service.mcp.servers import McpServers
from corral_plugins.tools.service.metrics import DECISIONS, ToolMetrics
from corral_plugins.tools.service.registry import ToolRegistry
from corral_plugins.tools.service.tools import ToolsService
from corral_plugins.tools.service.workflow_step import ToolStep
from corral_plugins.workflows.api import StepType

if TYPE_CHECKING:
    import click

SERVICES = (
    McpConnections,
    McpRefresh,
    McpServers,
    ToolRegistry,
    ContextBuilder,
    HeldResults,
    ToolExecutions,
    HeaderSecrets,
    HostBreakers,
    ToolPermits,
    HeldCalls,
    ToolCalls,
    ToolListing,
    CallHistory,
)


class ToolsPlugin(Plugin):
    """Tools: the actions that agents may take.

    The plugin decides on each tool call at the time of the call, based on the current permissions of the person on
    whose behalf the agent acts. Every call is recorded.
    """

    name = "tools"
    requires = ("accounts",)
    wants = ("admin", "agents", "approvals", "circuit_breakers", "files", "secrets", "tasks", "workers", "workflows")
    permissions = (
        Permission("tools.read", "View tools and their calls", holders=(*READERS, "agent")),
        Permission(
            "tools.use_external", "Let agents fetch data from and send data to external systems", holders=WRITERS
        ),
        Permission(
            "tools.use_dangerous", "Let agents run code and shell commands, also on remote machines", holders=WRITERS
        ),
        Permission("tools.manage", "Change the policies, risks and configuration of tools, and manage MCP servers"),
        Permission("tools.act", "Call tools for tasks whose lease the caller holds", holders=("worker", "agent")),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics, self._http_tools = ToolMetrics(), HttpTools()
        self._executions: ToolExecutions | None = None
        self._step = ToolStep()
        self._mcp: McpConnections | None = None
        self._asks_when_tainted: Callable[[], bool] = lambda: True

    async def start(self, runtime: Runtime) -> None:
        declared: Settings = runtime.service(Settings)
        self._asks_when_tainted = lambda: declared.get(settings.TAINT_ENABLED)
        breakers, self._mcp = runtime.service(HostBreakers), runtime.service(McpConnections)
        breakers.declare()
        self._mcp.declare_breakers()
        self._http_tools.set_services(runtime.service(Egress), runtime.service(HeaderSecrets), breakers)
        self._executions = runtime.service(ToolExecutions)
        registry = runtime.service(ToolRegistry)
        registry.log_ignored()
        self._metrics.names[:] = sorted(registry.contributed_tools())

    async def stop(self) -> None:
        if self._executions is not None:
            await self._executions.stop_running()
        await self._http_tools.close()
        if self._mcp is not None:
            await self._mcp.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ToolMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in SERVICES),
            Provide(Tools, ToolsService),
            Provide(ToolStep, lambda: self._step),
        ]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl
    def corral_tools(self) -> Iterable[Tool]:
        return self._http_tools.definitions()

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return [self._step.definition()]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.registry, routes.mcp, routes.all_calls, routes.lease]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [ToolCalled]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("tools.tasks", ("task.deleted",), jobs.on_task_deleted)]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job("tools.delete_calls", jobs.delete_calls), Job(JOB, jobs.run_approved)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.tools.commands import mcp_command_group, tools_command_group

        return [mcp_command_group, tools_command_group]

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("tools", self._taint_health)]

    def _taint_health(self) -> tuple[str, str]:
        if self._asks_when_tainted():
            return "ok", "Runs that received untrusted content need approval for external tools."
        return (
            "degraded",
            "Runs that received untrusted content need no approval for external tools (tools.taint_enabled is off).",
        )

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        tools, metrics = {"tool": self._metrics.names}, self._metrics
        return [
            Metric(
                name="corral_tool_calls_total",
                help="Number of tool calls by tool and decision.",
                kind="counter",
                labels={**tools, "decision": DECISIONS},
                collect=metrics.calls_by_decision,
            ),
            Metric(
                name="corral_tool_seconds",
                help="Duration of tool calls, in seconds.",
                kind="histogram",
                labels=tools,
                collect=metrics.seconds.read,
            ),
            Metric(
                name="corral_tainted_attempts_total",
                help="Number of attempts that received untrusted content.",
                kind="counter",
                collect=metrics.tainted_attempts,
            ),
        ]
