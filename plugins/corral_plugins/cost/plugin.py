"""The `cost` plugin: its manifest and its hook implementations."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.cost import jobs, models, settings
from corral_plugins.cost.api import EVENTS, Costs
from corral_plugins.cost.routes import routes
from corral_plugins.cost.service import price_table
from corral_plugins.cost.service.agent_limits import AgentLimits
from corral_plugins.cost.service.budget_limit_cache import BudgetLimitCache
from corral_plugins.cost.service.budget_maintenance import BudgetMaintenance
from corral_plugins.cost.service.installation_budget import Budgets
from corral_plugins.cost.service.ledger import CostLedger
from corral_plugins.cost.service.metrics import BudgetMetrics, BudgetRefusals, ProviderTotals
from corral_plugins.cost.service.price_overrides import PriceOverrides
from corral_plugins.cost.service.price_updates import PriceUpdates
from corral_plugins.cost.service.pricing import Pricing
from corral_plugins.cost.service.reported_costs import ReportedCosts
from corral_plugins.cost.service.reports import CostReports
from corral_plugins.cost.service.reservations import Reservations

REFRESH_SECONDS = 2

if TYPE_CHECKING:
    import click


class CostPlugin(Plugin):
    """Cost accounting.

    Records every use of a model or paid tool with its price, accurate to one micro-dollar, and enforces budgets. A use
    without a known price is reported as unpriced, never as zero.
    """

    name = "cost"
    requires = ("accounts",)
    wants = ("agents", "tasks", "workflows")
    permissions = (
        Permission("cost.read", "Read costs and prices", holders=READERS),
        Permission("cost.write", "Set budgets and prices, and correct costs"),
        Permission(
            "cost.report", "Report the costs of tasks whose lease the caller holds", holders=("worker", "agent")
        ),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._refusals = BudgetRefusals()

    async def start(self, runtime: Runtime) -> None:
        pricing, limits = runtime.service(Pricing), runtime.service(BudgetLimitCache)
        updates = runtime.service(PriceUpdates)

        async def refresh_caches() -> None:
            while True:
                await pricing.refresh_overrides()
                await limits.refresh()
                await updates.refresh()
                await asyncio.sleep(REFRESH_SECONDS)

        async def load_price_table(address: str) -> None:
            await asyncio.to_thread(price_table.load_price_table)

        runtime.supervise("prices and budgets", refresh_caches)
        runtime.when_serving(load_price_table)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def cost(ledger: CostLedger) -> Costs:
            return ledger

        services = (
            Pricing,
            BudgetLimitCache,
            Reservations,
            AgentLimits,
            CostLedger,
            PriceOverrides,
            Budgets,
            PriceUpdates,
            BudgetMaintenance,
            CostReports,
            ReportedCosts,
        )
        return [
            Provide(BudgetRefusals, lambda: self._refusals),
            *(Provide(service, service) for service in services),
            Provide(Costs, cost),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.cost.command import cost_command

        return [cost_command]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return jobs.SUBSCRIBERS

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [*ProviderTotals().metrics(), *BudgetMetrics(self._refusals).metrics()]
