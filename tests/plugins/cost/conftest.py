"""A kernel with the `cost` plugin, and helpers to record and read costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import Client, Kit
from corral_plugins.cost.api import BillableUsage, ChargedCost, Costs, Hold
from corral_plugins.cost.service import price_table


class Books:
    """The `Cost` service, and users who read its reports."""

    kit: Kit
    admin: Client
    member: Client

    async def build(self, kit: Kit) -> Books:
        self.kit, self._n = kit, 0
        self.admin, self.member = await kit.as_user("admin"), await kit.as_user("member")
        return self

    @property
    def cost(self) -> Costs:
        """The `Cost` service."""
        container: Any = self.kit.kernel.container
        service: Costs = container.get(Costs)
        return service

    async def work(self, fn: Callable[[], Any]) -> Any:
        """Run a function in a unit."""
        return await self.kit.kernel.database.work(fn)

    async def settle(
        self, usd: str | None = None, *, free: bool = False, hold: Hold | None = None, **given: Any
    ) -> ChargedCost:
        """Record an event with a reported cost or none, by default of a model that the price table lacks."""
        self._n += 1
        named = {"usage_key": f"key-{self._n}", "provider": "acme", "model": "one", **given}
        spent = BillableUsage(cost_usd=None if usd is None else Decimal(usd), **named)
        charged: ChargedCost = await self.work(lambda: self.cost.record_cost(spent, free=free, hold=hold))
        return charged

    async def pass_days(self, days: float) -> None:
        """Advance the clock; the users sign in again."""
        clock.travel(days * 86_400)
        self.admin, self.member = [await self.kit.sign_in(who.user["email"]) for who in (self.admin, self.member)]

    async def read(self, path: str, *, by: Client | None = None) -> Any:
        """Get a path below `/cost`, by default as the member."""
        answer = await (by or self.member).get(f"/cost/{path}")
        assert answer.status == 200, answer
        return answer.json()


@pytest.fixture
async def books(make_kit: Callable[..., Any]) -> Books:
    """A kernel on each engine, without other plugins."""
    await asyncio.to_thread(price_table.load_price_table)  # as a server does when it starts; not in the first unit
    return await Books().build(await make_kit(plugins=["cost"]))
