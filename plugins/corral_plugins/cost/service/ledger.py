"""The cost events: written once, never changed, read by who may see them. Implements `Cost`."""

from __future__ import annotations

from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Invalid, NotFound
from corral.http.page import Order, Page, paginate
from corral.ids import new_id
from corral_plugins.cost.api import MAX_TOKENS, Charged, Quote, Spent, Tokens
from corral_plugins.cost.models import CostEvent
from corral_plugins.cost.service import sums
from corral_plugins.cost.service.money import usd
from corral_plugins.cost.service.pricing import Prices
from corral_plugins.cost.shapes import MAX_USD, EventQuery, EventView

KEY_LENGTH = 200
COLUMNS = tuple(CostEvent._meta.columns)
_WRITE = Statement(
    lambda p: (
        CostEvent.insert({getattr(CostEvent, name): p(name) for name in COLUMNS})
        .on_conflict_ignore()
        .returning(CostEvent.id)
    )
)
_OF_KEY = Statement(
    lambda p: (
        CostEvent.select(CostEvent.id, CostEvent.cost_micro, CostEvent.price_source, CostEvent.price_version)
        .where((CostEvent.usage_key == p("key")) & (CostEvent.by_gateway == p("by_gateway")))
        .tuples()
    )
)


class Ledger:
    """The only writer of `cost_events`."""

    def __init__(self, prices: Prices) -> None:
        self._prices = prices

    def price(self, provider: str, model: str, tokens: Tokens, *, free: bool = False) -> Quote:
        return self._prices.quote(provider, model, tokens, free=free)

    def settle(self, spent: Spent, *, free: bool = False) -> Charged:
        check(spent)
        quote = self._prices.quote(spent.provider, spent.model, spent.tokens, free=free, reported=spent.cost_usd)
        event = _row(spent, quote)
        if _WRITE.one(event) is None:
            return self._repeated(spent)
        sums.add_event(event)
        return Charged(event_id=event["id"], **msgspec.structs.asdict(quote))

    def spent_on_task(self, task_id: str) -> int:
        return sums.at_key(sums.TASK_TOTAL, task_id).cost_micro

    @staticmethod
    def _repeated(spent: Spent) -> Charged:
        found = _OF_KEY.one({"key": spent.usage_key, "by_gateway": spent.by_gateway})
        assert found is not None, "an event that is not written is one whose key exists"
        event_id, cost, source, version = found
        return Charged(
            event_id=event_id,
            cost_micro_usd=cost,
            priced=cost is not None,
            price_source=source,
            price_version=version,
            repeated=True,
        )

    def page(self, query: EventQuery, by: Principal) -> Page[EventView]:
        """Events, newest first: an admin sees all, others their own and those of shared objects."""
        wanted: Any = CostEvent.select()
        narrowed = False
        if not sees_all(by):
            wanted = wanted.where(_seen(by))
        for name in ("task_id", "agent_id", "user_id", "provider", "model"):
            value = getattr(query, name)
            if isinstance(value, str):
                given = value.lower() if name.endswith("_id") else value
                wanted, narrowed = wanted.where(getattr(CostEvent, name) == given), True
        if query.since is not msgspec.UNSET:
            wanted, narrowed = wanted.where(CostEvent.ts >= clock.from_datetime(query.since)), True
        if query.until is not msgspec.UNSET:
            wanted, narrowed = wanted.where(CostEvent.ts < clock.from_datetime(query.until)), True
        order = (Order(CostEvent.ts), Order(CostEvent.id))
        total = None if narrowed else _count(by)
        return paginate(wanted, query, by, scope="cost.events", order=order, make=view, total=total)

    def one(self, event_id: str) -> EventView:
        """An event that is known to be there."""
        return view(CostEvent.get_by_id(event_id))

    def visible(self, event_id: str, by: Principal) -> EventView:
        """An event, if the caller sees it; `NotFound`."""
        row: CostEvent | None = CostEvent.get_or_none(CostEvent.id == event_id)
        if row is None or not (sees_all(by) or row.private_to in (None, by.user_id)):
            raise NotFound("There is no cost event with this id.")
        return view(row)


def check(spent: Spent) -> None:
    """Raise `Invalid` for counts and amounts that cannot be true, and for keys that cannot be kept."""
    for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"):
        if not 0 <= getattr(spent, name) <= MAX_TOKENS:
            raise Invalid.at(f"/{name}", "too_large", f"{name} must be from 0 to {MAX_TOKENS}.")
    if not 0 < len(spent.usage_key) <= KEY_LENGTH:
        raise Invalid.at("/usage_key", "too_long", f"usage_key must have 1 to {KEY_LENGTH} characters.")
    if spent.cost_usd is not None and not abs(spent.cost_usd) <= MAX_USD:
        raise Invalid.at("/cost_usd", "too_large", f"cost_usd must be at most {MAX_USD}.")


def sees_all(by: Principal) -> bool:
    """Whether private events of others are shown."""
    return by.is_admin or by.kind == "system"


def _seen(by: Principal) -> Any:
    return CostEvent.private_to.is_null() | (CostEvent.private_to == by.user_id)


def _count(by: Principal) -> int:
    """How many events the caller sees, from sums: counting rows would take longer with every event."""
    whole = sum(figures.events for _, _, figures in sums.groups(sums.TOTAL, sums.ALL_TIME, sums.ALL_TIME))
    if sees_all(by):
        return whole
    private = sums.groups(sums.PRIVATE, sums.ALL_TIME, sums.ALL_TIME)
    return whole - sum(figures.events for person, _, figures in private if person != by.user_id)


def _row(spent: Spent, quote: Quote) -> dict[str, Any]:
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


def _private_to(spent: Spent) -> str | None:
    """Tasks, runs and agents are shared; a conversation, or a person's own call, is that person's alone."""
    is_shared = spent.task_id or spent.run_id or (spent.agent_id and not spent.conversation_id)
    return None if is_shared else spent.user_id


def view(row: CostEvent) -> EventView:
    """An event for clients."""
    columns: dict[str, Any] = dict(row.__data__)
    cost = columns.pop("cost_micro")
    del columns["private_to"], columns["by_gateway"]
    return EventView(cost_usd=None if cost is None else usd(cost), priced=cost is not None, **columns)
