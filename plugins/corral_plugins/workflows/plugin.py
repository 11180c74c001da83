"""The `workflows` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.marketplace.api import Installer
from corral_plugins.tasks.api import TaskExecutor
from corral_plugins.tools.api import Tool
from corral_plugins.triggers.api import TaintCheck, TriggerAction
from corral_plugins.workflows import hookspecs, jobs
from corral_plugins.workflows.api import EVENTS, StepTasks, StepType, Workflows
from corral_plugins.workflows.models import Run, StepRun, Workflow, WorkflowVersion
from corral_plugins.workflows.routes import runs as run_routes
from corral_plugins.workflows.routes import workflows as workflow_routes
from corral_plugins.workflows.service import metrics
from corral_plugins.workflows.service.builtin_steps import BuiltInSteps
from corral_plugins.workflows.service.code_steps import ToolTaskExecutor
from corral_plugins.workflows.service.definitions import CANCEL_JOB, WorkflowStore
from corral_plugins.workflows.service.dry_runs import DryRuns
from corral_plugins.workflows.service.engine import Engine, GraphCache, StepStarter
from corral_plugins.workflows.service.event_waits import EventWaits
from corral_plugins.workflows.service.executors import StepExecutors
from corral_plugins.workflows.service.large_outputs import LargeOutputs
from corral_plugins.workflows.service.management import WorkflowManagement
from corral_plugins.workflows.service.metrics import WorkflowMetrics
from corral_plugins.workflows.service.missing_references import ReferenceChecker
from corral_plugins.workflows.service.run_events import RunEvents
from corral_plugins.workflows.service.run_views import RunViews
from corral_plugins.workflows.service.runs import RunsService
from corral_plugins.workflows.service.step_completion import EVENTS as AWAITED
from corral_plugins.workflows.service.step_completion import StepEvents
from corral_plugins.workflows.service.step_tasks import StepTasksService
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.service.template_installer import WorkflowTemplateInstaller
from corral_plugins.workflows.service.tool import WorkflowTool
from corral_plugins.workflows.service.trigger_action import TAINT_CHECK, WorkflowTriggerAction
from corral_plugins.workflows.service.validation import DefinitionValidator
from corral_plugins.workflows.settings import SETTINGS

if TYPE_CHECKING:
    import click


class WorkflowsPlugin(Plugin):
    """Workflows: graphs of steps that run to completion, even after crashes.

    A run shows the input, the output, the cost and the error of each step. It can wait for people for days, and can be
    repeated from the point of failure.
    """

    name = "workflows"
    requires = ("accounts", "agents", "event_log", "expressions", "tasks")
    wants = (
        "admin",
        "approvals",
        "circuit_breakers",
        "code_reviews",
        "cost",
        "files",
        "llm",
        "marketplace",
        "secrets",
        "tools",
        "triggers",
    )
    permissions = (
        Permission("workflows.read", "Read workflows and their runs", holders=READERS),
        Permission("workflows.write", "Create workflows; change one's own workflows", holders=WRITERS),
        Permission("workflows.run", "Run workflows, and answer steps that wait for input", holders=WRITERS),
        Permission("workflows.manage", "Change the workflows of others, and control their runs"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = WorkflowMetrics()
        self._steps = BuiltInSteps()
        self._trigger_action = WorkflowTriggerAction()
        self._tool = WorkflowTool()
        self._template_installer = WorkflowTemplateInstaller()
        self._executors: StepExecutors | None = None

    async def start(self, runtime: Runtime) -> None:
        self._metrics.types.extend(sorted(runtime.service(StepTypes).all()))
        self._steps.http.declare_breakers()
        self._executors = runtime.service(StepExecutors)
        runtime.supervise("leases", self._executors.run)
        runtime.supervise("awaited events", runtime.service(EventWaits).run)

    async def stop(self) -> None:
        if self._executors is not None:
            await self._executors.stop()
        await self._steps.http.close()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (
            StepTypes,
            StepStarter,
            GraphCache,
            LargeOutputs,
            Engine,
            StepExecutors,
            StepEvents,
            EventWaits,
            DefinitionValidator,
            WorkflowStore,
            WorkflowManagement,
            RunsService,
            RunViews,
            ReferenceChecker,
            DryRuns,
            RunEvents,
        )
        return [
            Provide(WorkflowMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Workflows, _provide_workflows),
            Provide(StepTasks, StepTasksService),
            *self._steps.services(),
            Provide(WorkflowTriggerAction, lambda: self._trigger_action),
            Provide(WorkflowTool, lambda: self._tool),
            Provide(WorkflowTemplateInstaller, lambda: self._template_installer),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [workflow_routes.routes, run_routes.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [Workflow, WorkflowVersion, Run, StepRun]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.workflows.commands import workflows_command_group

        return [workflows_command_group]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_hookspecs(self) -> Iterable[ModuleType]:
        return [hookspecs]

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return self._steps.definitions()

    @hookimpl(optionalhook=True)
    def corral_task_executors(self) -> Iterable[TaskExecutor]:
        return [ToolTaskExecutor()]

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return [self._tool.definition()]

    @hookimpl(optionalhook=True)
    def corral_trigger_actions(self) -> Iterable[TriggerAction]:
        return [self._trigger_action.definition()]

    @hookimpl(optionalhook=True)
    def corral_trigger_taint_checks(self) -> Iterable[TaintCheck]:
        return [TAINT_CHECK]

    @hookimpl(optionalhook=True)
    def corral_template_installers(self) -> Iterable[Installer]:
        return [self._template_installer.definition()]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("workflows.steps", AWAITED, jobs.on_event)]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job("workflows.advance", jobs.advance_run, lease_seconds=60), Job(CANCEL_JOB, jobs.cancel_runs)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [Schedule("workflows.sweep", 5, jobs.sweep), Schedule("workflows.prune", 86_400, jobs.prune)]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_workflow_runs",
                help="Number of workflow runs that have not ended, by status.",
                labels={"status": metrics.STATUSES},
                collect=metrics.count_active_runs,
            ),
            Metric(
                name="corral_workflow_step_seconds",
                help="Duration of the steps of workflow runs, in seconds.",
                kind="histogram",
                labels={"type": self._metrics.types},
                collect=self._metrics.step_seconds.read,
            ),
            Metric(
                name="corral_workflow_advance_lag_seconds",
                help="Time that a workflow run waited in the queue before it was processed, in seconds.",
                kind="histogram",
                collect=self._metrics.lag_seconds.read,
            ),
        ]


def _provide_workflows(runs: RunsService) -> Workflows:
    return runs
