"""The `ssh` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.ssh import jobs, models, settings
from corral_plugins.ssh.api import EVENTS
from corral_plugins.ssh.routes import routes
from corral_plugins.ssh.service.connections import SshConnections
from corral_plugins.ssh.service.credentials import ConnectionCredentials
from corral_plugins.ssh.service.executions import SshExecutions
from corral_plugins.ssh.service.metrics import SshMetrics
from corral_plugins.ssh.service.runner import SshRunner
from corral_plugins.ssh.service.tool import SshTool
from corral_plugins.tools.api import Tool

if TYPE_CHECKING:
    import click


class SshPlugin(Plugin):
    """SSH connections, for running commands on machines whose host keys admins have accepted.

    Agents run commands with the tool `ssh.execute`. Each command is recorded with its output and its outcome.
    """

    name = "ssh"
    requires = ("accounts", "secrets")
    wants = ("circuit_breakers", "tools")
    permissions = (
        Permission("ssh.read", "Read SSH connections and the records of executed commands"),
        Permission("ssh.write", "Create, change and test SSH connections, and accept host keys"),
        Permission("ssh.execute", "Run commands on machines over SSH"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics, self._tool = SshMetrics(), SshTool()
        self._runner: SshRunner | None = None

    async def start(self, runtime: Runtime) -> None:
        self._runner = runtime.service(SshRunner)
        self._runner.declare_breakers()
        self._tool.set_runner(self._runner)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.stop()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (ConnectionCredentials, SshConnections, SshExecutions, SshRunner)
        return [Provide(SshMetrics, lambda: self._metrics), *(Provide(part, part) for part in parts)]

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

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return [self._tool.definition()]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.ssh.command import ssh_command_group

        return [ssh_command_group]
