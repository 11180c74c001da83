"""The plugin `cost`: its manifest and what it contributes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from corral.auth.principal import READERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_plugins.cost import jobs, models, settings
from corral_plugins.cost.api import Cost
from corral_plugins.cost.routes import routes
from corral_plugins.cost.service import table
from corral_plugins.cost.service.figures import ProviderFigures
from corral_plugins.cost.service.ledger import Ledger
from corral_plugins.cost.service.price_list import PriceList
from corral_plugins.cost.service.pricing import Prices
from corral_plugins.cost.service.reported import ReportedEvents
from corral_plugins.cost.service.reports import Reports

REFRESH_SECONDS = 2


class CostPlugin(Plugin):
    """What everything costs.

    Every use of a model or paid tool is an event with its price, to the micro-dollar. What has no price is never zero.
    """

    name = "cost"
    wants = ("agents", "tasks")
    permissions = (
        Permission("cost.read", "See what was spent, and prices", holders=READERS),
        Permission("cost.write", "Set prices and correct costs"),
        Permission("cost.report", "Report money spent under a lease", holders=("worker", "agent")),
    )

    async def start(self, runtime: Runtime) -> None:
        prices = runtime.service(Prices)

        async def follow() -> None:
            while True:
                await prices.refresh()
                await asyncio.sleep(REFRESH_SECONDS)

        async def load(address: str) -> None:
            await asyncio.to_thread(table.load)

        runtime.supervise("prices", follow)
        runtime.when_serving(load)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def cost(ledger: Ledger) -> Cost:
            return ledger

        parts = (Prices, Ledger, PriceList, Reports, ReportedEvents)
        return [*(Provide(part, part) for part in parts), Provide(Cost, cost)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

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
    def corral_metrics(self) -> Iterable[Metric]:
        figures = ProviderFigures()
        labels = {"provider": figures.names}
        return [
            # Gauges: read from the database, so every process knows the whole, and corrections make it less.
            Metric(
                name="corral_cost_usd_total", help="What was spent, by provider.", labels=labels, collect=figures.cost
            ),
            Metric(
                name="corral_cost_unpriced_tokens_total",
                help="Tokens without a price, by provider.",
                labels=labels,
                collect=figures.unpriced_tokens,
            ),
        ]
