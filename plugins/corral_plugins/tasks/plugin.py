"""The `tasks` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Authenticator, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_core.backup.api import RestoreStep
from corral_plugins.agents.api import Agents, AgentStatistics
from corral_plugins.tasks import hookspecs, jobs, models, settings
from corral_plugins.tasks.api import EVENTS, Tasks
from corral_plugins.tasks.routes import tasks as task_routes
from corral_plugins.tasks.routes import worker_protocol
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.agent_models import AgentModels
from corral_plugins.tasks.service.agent_tools import AgentTools, TaskTools
from corral_plugins.tasks.service.claim_budgets import ClaimBudgets
from corral_plugins.tasks.service.claim_payloads import ClaimPayloads
from corral_plugins.tasks.service.claims import TaskClaims
from corral_plugins.tasks.service.creation import TaskCreation
from corral_plugins.tasks.service.dead_letters import TaskDeadLetters
from corral_plugins.tasks.service.explain import TaskExplanations
from corral_plugins.tasks.service.leases import AttemptPrincipals, AttemptTokenAuthenticator, TaskLeases
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.queries import TaskQueries
from corral_plugins.tasks.service.retention import TaskRetention
from corral_plugins.tasks.service.reviews import TaskReviews
from corral_plugins.tasks.service.rows import TaskViews
from corral_plugins.tasks.service.run_reports import TaskLogs, UsageReports
from corral_plugins.tasks.service.runs import TaskRuns
from corral_plugins.tasks.service.statistics import AgentStatisticsService, TaskMetrics
from corral_plugins.tasks.service.tasks import TasksService
from corral_plugins.tasks.service.timers import DueTaskNotifier, TaskTimers
from corral_plugins.tasks.service.transitions import TaskTransitions
from corral_plugins.tasks.service.trigger_actions import TAINT_CHECK, TaskTriggerAction
from corral_plugins.tasks.service.usual_costs import UsualCosts
from corral_plugins.tools.api import Tool
from corral_plugins.triggers.api import TaintCheck, TriggerAction

if TYPE_CHECKING:
    import click


class TasksPlugin(Plugin):
    """Tasks: pieces of work for agents, and their results.

    A worker claims a task under a lease. A task survives every crash, runs one attempt at a time, and always ends.
    """

    name = "tasks"
    requires = ("accounts", "agents", "workers")
    wants = (
        "admin",
        "approvals",
        "backup",
        "circuit_breakers",
        "code_reviews",
        "cost",
        "dead_letter",
        "files",
        "llm",
        "messages",
        "secrets",
        "tools",
        "triggers",
    )
    permissions = (
        Permission("tasks.read", "Read tasks, their logs and statistics", holders=(*READERS, "agent")),
        Permission("tasks.write", "Create tasks; change, cancel and end one's own tasks", holders=(*WRITERS, "agent")),
        Permission("tasks.manage", "Change, cancel and end the tasks of others"),
        Permission("tasks.act", "Report on tasks whose lease the caller holds", holders=("worker", "agent")),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = TaskMetrics()
        self._tools = TaskTools()
        self._trigger_action = TaskTriggerAction()

    async def start(self, runtime: Runtime) -> None:
        self._tools.set_implementation(runtime.service(AgentTools))
        creation, actions = runtime.service(TaskCreation), runtime.service(OwnerActions)
        self._trigger_action.set_services(creation, actions, runtime.service(Agents))
        runtime.supervise("due tasks", runtime.service(DueTaskNotifier).run)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (
            TaskTransitions,
            TaskDeadLetters,
            TaskOutcomes,
            AgentModels,
            ClaimPayloads,
            UsualCosts,
            ClaimBudgets,
            TaskClaims,
            TaskReviews,
            TaskRuns,
            TaskLeases,
            TaskLogs,
            TaskCreation,
            OwnerActions,
            TaskViews,
            TaskQueries,
            UsageReports,
            TaskExplanations,
            TaskTimers,
            TaskRetention,
            DueTaskNotifier,
            AgentTools,
            AttemptPrincipals,
        )
        return [
            Provide(TaskMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Tasks, TasksService),
            Provide(AgentStatistics, AgentStatisticsService),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [task_routes.routes, worker_protocol.routes]

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
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [AttemptTokenAuthenticator]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.tasks.commands.run import run_task_command
        from corral_plugins.tasks.commands.status import status_command
        from corral_plugins.tasks.commands.tasks import tasks_command_group
        from corral_plugins.tasks.demo.command import demo_command

        return [demo_command, run_task_command, status_command, tasks_command_group]

    @hookimpl(optionalhook=True)
    def corral_restore_steps(self) -> Iterable[type[RestoreStep]]:
        return [TaskLeases]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("tasks.people", ("user.purged",), jobs.enqueue_cancel_for_purged_user)]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return self._tools.all()

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return [self._trigger_action.definition()]

    @hookimpl(optionalhook=True)
    def corral_trigger_taint_checks(self) -> Iterable[TaintCheck]:
        return [TAINT_CHECK]

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]
