"""The `approvals` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, Settings, hookimpl
from corral_plugins.approvals import jobs, models, settings
from corral_plugins.approvals.api import EVENTS, Approvals
from corral_plugins.approvals.routes import routes
from corral_plugins.approvals.service.auto_approval import AutoApproval
from corral_plugins.approvals.service.comments import ApprovalComments
from corral_plugins.approvals.service.decisions import ApprovalDecisions
from corral_plugins.approvals.service.eligibility import Eligibility
from corral_plugins.approvals.service.listing import ApprovalListing
from corral_plugins.approvals.service.metrics import ApprovalMetrics
from corral_plugins.approvals.service.opening import ApprovalsService
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.service.timers import ApprovalTimers
from corral_plugins.approvals.service.workflow_step import ApprovalStep, ApprovalStepType
from corral_plugins.workflows.api import StepType

if TYPE_CHECKING:
    import click

PARTS = (Eligibility, ApprovalOutcomes, ApprovalListing, ApprovalDecisions, ApprovalComments, ApprovalTimers)


class ApprovalsPlugin(Plugin):
    """Approvals: people approve or reject consequential actions before they happen.

    A decision applies only to the exact content that will be executed. After every decision, the requester continues
    immediately and receives the reason.
    """

    name = "approvals"
    requires = ("accounts",)
    wants = ("agents", "expressions", "tasks", "tools", "workflows")
    permissions = (
        Permission("approvals.read", "Read approvals", holders=(*READERS, "agent", "worker")),
        Permission("approvals.write", "Ask for approvals and comment on them", holders=(*WRITERS, "agent", "worker")),
        Permission("approvals.decide", "Decide approvals", holders=WRITERS),
        Permission("approvals.manage", "Change the rules that approve requests without a person"),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = ApprovalMetrics()
        self._step = ApprovalStepType()
        self._rules: AutoApproval | None = None

    async def start(self, runtime: Runtime) -> None:
        self._step.implementation = runtime.service(ApprovalStep)
        self._rules = runtime.service(AutoApproval)

    def _check_rules(self, rules: list[settings.AutoApproveRule], _: Settings) -> str | None:
        return self._rules.find_fault(rules) if self._rules is not None else None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(ApprovalMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in PARTS),
            Provide(Approvals, ApprovalsService),
            Provide(ApprovalStep, ApprovalStep),
            Provide(AutoApproval, AutoApproval),
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
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("approvals.runs", jobs.RUN_ENDS, jobs.on_run_ended)]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        checked = msgspec.structs.replace(settings.AUTO_APPROVE, check=self._check_rules)
        return [*settings.UNCHECKED, checked]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.approvals.commands import approvals_command_group

        return [approvals_command_group]

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> Iterable[StepType]:
        return [self._step.definition()]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()
