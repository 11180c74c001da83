"""The `agents` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Authenticator, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.agents import jobs
from corral_plugins.agents.api import AgentCreated, AgentDeleted, Agents, AgentStatusChanged, AgentUpdated
from corral_plugins.agents.models import Agent, AgentToken, AgentVersion
from corral_plugins.agents.routes import routes
from corral_plugins.agents.service.configuration_conversion import MAX_STEPS
from corral_plugins.agents.service.management import MAX_AGENTS, AgentManagement
from corral_plugins.agents.service.registry import AgentsService
from corral_plugins.agents.service.rows import AgentViews
from corral_plugins.agents.service.states import (
    ERROR_AFTER_FAILURES,
    PAUSE_AFTER_STALLS,
    STATUSES,
    AgentStates,
    StateChangePublisher,
    count_by_status,
)
from corral_plugins.agents.service.template_installer import AgentTemplateInstaller
from corral_plugins.agents.service.tokens import TOKEN_TTL_DAYS, AgentTokens, StandingTokenAuthenticator
from corral_plugins.agents.service.trigger_actions import AgentTriggerActions
from corral_plugins.agents.service.versions import AgentVersions
from corral_plugins.marketplace.api import Installer
from corral_plugins.triggers.api import TriggerAction

if TYPE_CHECKING:
    import click


class AgentsPlugin(Plugin):
    """Agents: named configurations with which workers run tasks.

    People create, start and stop agents, and watch their work. Each change to an agent's configuration creates a
    version. People can compare versions and roll back to an earlier one.
    """

    name = "agents"
    requires = ("accounts",)
    wants = ("admin", "code_reviews", "cost", "llm", "marketplace", "tasks", "tools", "triggers", "workers")
    permissions = (
        Permission("agents.read", "Read agents, their versions and statistics", holders=(*READERS, "agent")),
        Permission("agents.write", "Create agents; change, start and stop one's own agents", holders=WRITERS),
        Permission("agents.manage", "Change all agents, override budgets and allow dangerous tools"),
    )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._changes = StateChangePublisher()
        self._trigger_actions = AgentTriggerActions()
        self._template_installer = AgentTemplateInstaller()

    async def start(self, runtime: Runtime) -> None:
        self._trigger_actions.set_service(runtime.service(AgentStates))

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(StateChangePublisher, lambda: self._changes),
            Provide(Agents, AgentsService),
            Provide(AgentViews, AgentViews),
            Provide(AgentManagement, AgentManagement),
            Provide(AgentStates, AgentStates),
            Provide(AgentVersions, AgentVersions),
            Provide(AgentTokens, AgentTokens),
            Provide(AgentTemplateInstaller, lambda: self._template_installer),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [Agent, AgentVersion, AgentToken]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.agents.commands import agents_command_group

        return [agents_command_group]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [AgentStatusChanged, AgentCreated, AgentUpdated, AgentDeleted]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [
            Subscriber("agents.people", ("user.purged",), jobs.end_tokens_of_purged_user),
            Subscriber("agents.budgets", ("budget.exceeded",), jobs.pause_agent_over_budget),
        ]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job("agents.detach", jobs.detach_deleted_agent)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [
            Schedule("agents.sweep", 60, jobs.delete_expired_tokens),
            Schedule("agents.purge", 86_400, jobs.purge_deleted_agents),
        ]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return [MAX_STEPS, MAX_AGENTS, ERROR_AFTER_FAILURES, PAUSE_AFTER_STALLS, TOKEN_TTL_DAYS]

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [StandingTokenAuthenticator]

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return self._trigger_actions.definitions()

    @hookimpl(optionalhook=True)
    def corral_template_installers(self) -> Iterable[Installer]:
        return [self._template_installer.definition()]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_agents",
                help="Number of agents by state.",
                labels={"status": STATUSES},
                collect=count_by_status,
            ),
            Metric(
                name="corral_agent_state_changes_total",
                help="Number of agent state changes, by new state.",
                kind="counter",
                labels={"to": STATUSES},
                collect=self._changes.count_by_state,
            ),
        ]
