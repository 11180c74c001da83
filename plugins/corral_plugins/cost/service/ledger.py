"""The ledger of cost events, which are written once and never changed.

The ledger also decides which events a user may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Invalid, NotFound
from corral.http.page import Order, Page, paginate
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.cost.api import (
    MAX_TOKENS,
    AgentBudget,
    BillableUsage,
    ChargedCost,
    Headroom,
    Hold,
    NewReservation,
    PriceQuote,
    TokenCounts,
)
from corral_plugins.cost.models import CostEvent
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.agent_limits import AgentLimits
from corral_plugins.cost.service.budget_limit_cache import REVISION
from corral_plugins.cost.service.day_buckets import month_of
from corral_plugins.cost.service.money import to_micro_usd, to_usd
from corral_plugins.cost.service.pricing import Pricing
from corral_plugins.cost.service.reservations import Reservations
from corral_plugins.cost.settings import DEFAULT_ATTEMPT_USD, UNPRICED_USES
from corral_plugins.cost.shapes import MAX_USD, CostEventQuery, CostEventView
from corral_plugins.workflows.api import Workflows

MAX_KEY_LENGTH = 200
SMALLEST_AMOUNT = 1
"""The amount in micro-USD that is reserved for a use without a known price.

The amount fits into any budget that has money left.
"""
UNPRICED = "The model has no known price, and the setting cost.unpriced refuses such uses."
COLUMNS = tuple(CostEvent._meta.columns)
_INSERT = Statement(
    lambda p: (
        CostEvent.insert({getattr(CostEvent, name): p(name) for name in COLUMNS})
        .on_conflict_ignore()
        .returning(CostEvent.id, REVISION)
    )
)
_BY_USAGE_KEY = Statement(
    lambda p: (
        CostEvent.select(CostEvent.id, CostEvent.cost_micro, CostEvent.price_source, CostEvent.price_version)
        .where((CostEvent.usage_key == p("key")) & (CostEvent.by_gateway == p("by_gateway")))
        .tuples()
    )
)


class CostLedger:
    """Implements `Costs`. No other class adds cost events. Every method runs in the caller's unit of work."""

    workflows: Workflows | None

    def __init__(
        self, settings: Settings, pricing: Pricing, reservations: Reservations, agent_limits: AgentLimits
    ) -> None:
        self._settings, self._pricing = settings, pricing
        self._reservations, self._agent_limits = reservations, agent_limits

    def quote(self, provider: str, model: str, tokens: TokenCounts, *, free: bool = False) -> PriceQuote:
        return self._pricing.quote(provider, model, tokens, free=free)

    # -- reservations

    def has_limits(self) -> bool:
        return self._refuses_unpriced or self._reservations.may_exist

    def is_limited(self, agent_id: str | None) -> bool:
        return self._refuses_unpriced or self._reservations.is_limited(agent_id)

    @property
    def _refuses_unpriced(self) -> bool:
        return bool(self._settings.get(UNPRICED_USES) == "refuse")

    def amount_to_reserve(self, quote: PriceQuote, estimate_micro_usd: int | None = None) -> int:
        if quote.cost_micro_usd is None:
            if self._refuses_unpriced:
                raise self._reservations.record_refusal("global", UNPRICED)
            return SMALLEST_AMOUNT
        if quote.cost_micro_usd == 0:
            return 0
        return quote.cost_micro_usd if estimate_micro_usd is None else max(SMALLEST_AMOUNT, estimate_micro_usd)

    def default_attempt_micro_usd(self) -> int:
        return to_micro_usd(self._settings.get(DEFAULT_ATTEMPT_USD))

    def headroom(self, agent_id: str | None) -> Headroom:
        return self._reservations.headroom(agent_id)

    def reserve(self, wanted: NewReservation) -> Hold | None:
        return self._reservations.reserve(wanted)

    def draw(self, wanted: NewReservation) -> Hold | None:
        return self._reservations.draw(wanted)

    def release(self, hold: Hold | None) -> None:
        if hold is not None:
            self._reservations.settle(hold.holder_id, held=hold.amount_micro_usd, cost=0, agent_id=None)

    def release_attempt(self, attempt_id: str, *, is_capped: bool) -> None:
        if is_capped or self._reservations.may_exist:
            self._reservations.release(attempt_id)

    # -- events

    def record_cost(self, spent: BillableUsage, *, free: bool = False, hold: Hold | None = None) -> ChargedCost:
        _validate_usage(spent)
        quote = self._pricing.quote(spent.provider, spent.model, spent.tokens, free=free, reported=spent.cost_usd)
        event = _event_row(spent, quote)
        inserted = _INSERT.one(event)
        if inserted is None:
            self.release(hold)
            return self._stored_charge(spent)
        self._reservations.confirm_limits(inserted[1])
        self._settle(spent, quote.cost_micro_usd or 0, hold)
        rollups.add_event(event, self._workflow_of(spent.run_id))
        return ChargedCost(event_id=event["id"], **msgspec.structs.asdict(quote))

    def _settle(self, spent: BillableUsage, cost: int, hold: Hold | None) -> None:
        """Count the cost of a call instead of the amount that was set aside for the call.

        Costs reported by a worker use the reservation of the worker's attempt.

        Call this method before the event is added to the rollups, because a new counter starts with the sum of the
        rollups.
        """
        if hold is None and not cost:
            return
        reported_by = None if spent.by_gateway else spent.attempt_id
        self._reservations.settle(
            hold.holder_id if hold is not None else reported_by,
            held=hold.amount_micro_usd if hold is not None else 0,
            cost=cost,
            agent_id=spent.agent_id,
            is_call=hold is not None and hold.holder_id != spent.attempt_id,
        )

    def _workflow_of(self, run_id: str | None) -> str | None:
        run = self.workflows.find_run(run_id) if self.workflows is not None and run_id is not None else None
        return None if run is None else run.workflow_id

    # -- agents

    def set_agent_limit(self, agent_id: str, limit_micro_usd: int | None) -> None:
        self._agent_limits.set_limit(agent_id, limit_micro_usd)

    def lift_agent_limit(self, agent_id: str) -> None:
        self._agent_limits.lift(agent_id)

    def agent_budgets(self, agent_ids: Sequence[str]) -> dict[str, AgentBudget]:
        return self._agent_limits.budgets_of(agent_ids)

    def spent_by_agents(self, agent_ids: Sequence[str]) -> dict[str, int]:
        return {**dict.fromkeys(agent_ids, 0), **rollups.costs_in_month(month_of(clock.now()), agent_ids)}

    def spent_on_task(self, task_id: str) -> int:
        return rollups.all_time_total(rollups.TASK_TOTAL, task_id).cost_micro

    @staticmethod
    def _stored_charge(spent: BillableUsage) -> ChargedCost:
        row = _BY_USAGE_KEY.one({"key": spent.usage_key, "by_gateway": spent.by_gateway})
        assert row is not None, "the insert is ignored only if the key exists"
        event_id, cost, source, version = row
        return ChargedCost(
            event_id=event_id,
            cost_micro_usd=cost,
            price_source=source,
            price_version=version,
            repeated=True,
        )

    def list_events(self, query: CostEventQuery, by: Principal) -> Page[CostEventView]:
        """Return a page of events, newest first.

        Admins see all events. Other users do not see the costs of other users' conversations and direct calls.
        """
        events: Any = CostEvent.select()
        filtered = False
        if not _sees_all(by):
            events = events.where(CostEvent.private_to.is_null() | (CostEvent.private_to == by.user_id))
        for name in ("task_id", "agent_id", "user_id", "provider", "model"):
            value = getattr(query, name)
            if isinstance(value, str):
                value = value.lower() if name.endswith("_id") else value
                events, filtered = events.where(getattr(CostEvent, name) == value), True
        if query.since is not msgspec.UNSET:
            events, filtered = events.where(CostEvent.ts >= clock.from_datetime(query.since)), True
        if query.until is not msgspec.UNSET:
            events, filtered = events.where(CostEvent.ts < clock.from_datetime(query.until)), True
        order = (Order(CostEvent.ts), Order(CostEvent.id))
        total = None if filtered else _count_visible(by)
        return paginate(events, query, by, scope="cost.events", order=order, make=_event_view, total=total)

    def get_event(self, event_id: str) -> CostEventView:
        """Return an existing event without checking whether the caller may see it."""
        return _event_view(CostEvent.get_by_id(event_id))

    def get_visible_event(self, event_id: str, by: Principal) -> CostEventView:
        """Return an event. Raise `NotFound` if the event does not exist or the caller may not see it."""
        row: CostEvent | None = CostEvent.get_or_none(CostEvent.id == event_id)
        if row is None or not (_sees_all(by) or row.private_to in (None, by.user_id)):
            raise NotFound("There is no cost event with this id.")
        return _event_view(row)


def _validate_usage(spent: BillableUsage) -> None:
    for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"):
        if not 0 <= getattr(spent, name) <= MAX_TOKENS:
            raise Invalid.at(f"/{name}", "too_large", f"{name} must be between 0 and {MAX_TOKENS}.")
    if not 0 < len(spent.usage_key) <= MAX_KEY_LENGTH:
        raise Invalid.at("/usage_key", "too_long", f"usage_key must have 1 to {MAX_KEY_LENGTH} characters.")
    if spent.cost_usd is not None and not abs(spent.cost_usd) <= MAX_USD:
        raise Invalid.at("/cost_usd", "too_large", f"cost_usd must be at most {MAX_USD}.")


def _sees_all(by: Principal) -> bool:
    return by.is_admin or by.kind == "system"


def _count_visible(by: Principal) -> int:
    """Return the number of events that the caller may see. The number is taken from the rollups.

    Counting the rows would become slower as events accumulate.
    """
    total = sum(totals.events for _, _, totals in rollups.grouped_totals(rollups.TOTAL))
    if _sees_all(by):
        return total
    private = rollups.grouped_totals(rollups.PRIVATE)
    return total - sum(totals.events for user_id, _, totals in private if user_id != by.user_id)


def _event_row(spent: BillableUsage, quote: PriceQuote) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.structs.asdict(spent)
    del row["cost_usd"]
    return {
        **row,
        "id": new_id(),
        "ts": clock.now(),
        "private_to": _private_to(spent),
        "provider": spent.provider[:64],
        "model": spent.model[:200],
        "note": spent.note[:500],
        "cost_micro": quote.cost_micro_usd,
        "price_source": quote.price_source,
        "price_version": quote.price_version,
    }


def _private_to(spent: BillableUsage) -> str | None:
    """Return the only non-admin user who may see the cost event, or None if every user who may read costs can see it.

    Costs of tasks, runs and agents are visible to every user who may read costs. Costs of conversations and direct
    calls are private to the user who caused them.
    """
    is_shared = spent.task_id or spent.run_id or (spent.agent_id and not spent.conversation_id)
    return None if is_shared else spent.user_id


def _event_view(row: CostEvent) -> CostEventView:
    columns: dict[str, Any] = dict(row.__data__)
    cost = columns.pop("cost_micro")
    del columns["private_to"], columns["by_gateway"]
    return CostEventView(cost_usd=None if cost is None else to_usd(cost), priced=cost is not None, **columns)
