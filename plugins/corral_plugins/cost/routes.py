"""HTTP of costs."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Conflict
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.cost.service.ledger import Ledger
from corral_plugins.cost.service.price_list import PriceList
from corral_plugins.cost.service.reported import ReportedEvents
from corral_plugins.cost.service.reports import Reports
from corral_plugins.cost.shapes import (
    ByAgent,
    ByProvider,
    Daily,
    DailyQuery,
    DaysQuery,
    EventQuery,
    EventView,
    FoundPrice,
    LookupQuery,
    ModelRank,
    NewEvent,
    NewPrice,
    PriceChange,
    PriceQuery,
    PriceView,
    RankedQuery,
    Summary,
    TaskCost,
    UserCost,
    ZoneQuery,
)

routes = Routes("/cost", tag="Cost Management")

READ, WRITE = "cost.read", "cost.write"


@routes.get("/summary", needs=READ)
def get_cost_summary(query: ZoneQuery, reports: Reports) -> Summary:
    """What everything cost: today, this week, this month, last month and in all."""
    return reports.summary(query)


@routes.get("/daily", needs=READ)
def get_daily_cost(query: DailyQuery, reports: Reports) -> Daily:
    """What each of the last days cost, oldest first."""
    return reports.daily(query)


@routes.get("/by-agent", needs=READ)
def get_cost_by_agent(query: DaysQuery, reports: Reports) -> ByAgent:
    """What each agent cost in the last days, the most expensive first."""
    return reports.by_agent(query)


@routes.get("/by-provider", needs=READ)
def get_cost_by_provider(query: DaysQuery, reports: Reports) -> ByProvider:
    """What each provider and its models cost in the last days, the most expensive first."""
    return reports.by_provider(query)


@routes.get("/by-model", needs=READ)
def get_cost_by_model(query: RankedQuery, reports: Reports) -> Page[ModelRank]:
    """What each model cost in the last days, the most expensive first."""
    return reports.by_model(query)


@routes.get("/by-task", needs=READ)
def get_cost_by_task(query: RankedQuery, reports: Reports) -> Page[TaskCost]:
    """What each task cost in the last days, the most expensive first."""
    return reports.by_task(query)


@routes.get("/by-user", needs=WRITE)
def get_cost_by_user(query: RankedQuery, reports: Reports) -> Page[UserCost]:
    """What was spent for each person in the last days, the most expensive first."""
    return reports.by_user(query)


@routes.get("/events", needs=READ, raises=("invalid_cursor",))
def list_cost_events(query: EventQuery, ledger: Ledger, caller: Principal) -> Page[EventView]:
    """List cost events, newest first: those of shared objects and one's own; admins see all."""
    return ledger.page(query, caller)


@routes.get("/events/{id}", needs=READ, raises=("not_found",))
def get_cost_event(id: str, ledger: Ledger, caller: Principal) -> EventView:
    """Read a cost event."""
    return ledger.visible(id, caller)


@routes.post("/events", needs=("cost.report", WRITE), status=201, raises=("forbidden", "lease_lost"))
async def create_cost_event(
    body: NewEvent, reported: ReportedEvents, caller: Principal, request: Request, work: Work
) -> Answer[EventView]:
    """Record money spent outside the gateway, or correct what was recorded.

    A known `usage_key` adds nothing and answers 200 with the first event. Under a lease that has ended the event is
    recorded, and 409 `lease_lost` answered.
    """
    named = body.lease_id or request.header("corral-lease")
    lease_id = named.lower() if named is not None else caller.lease_id
    taken = await work(lambda: reported.take(body, lease_id, caller), entry=request.entry(caller))
    if taken.is_late:
        raise Conflict("The lease has ended; what it spent is recorded.", code="lease_lost")
    return Answer(body=taken.event, status=201 if taken.is_new else 200)


@routes.get("/prices", needs=READ, raises=("invalid_cursor",))
def list_prices(query: PriceQuery, prices: PriceList, caller: Principal) -> Page[PriceView]:
    """List prices: those set by admins, the newest first, then the built-in ones."""
    return prices.page(query, caller)


@routes.post("/prices", needs=WRITE, status=201, raises=("duplicate", "quota_exceeded"))
def create_price(body: NewPrice, prices: PriceList) -> PriceView:
    """Set a price that wins over the built-in one."""
    return prices.create(body)


@routes.get("/prices/lookup", needs=READ)
def look_up_price(query: LookupQuery, prices: PriceList) -> FoundPrice:
    """Tell which price holds for a model, and where it is from."""
    return prices.lookup(query)


@routes.put("/prices/{id}", needs=WRITE, raises=("not_found", "duplicate", "precondition_failed", "invalid_state"))
def update_price(id: str, body: PriceChange, match: IfMatch, prices: PriceList) -> PriceView:
    """Change a price from now on; events keep what they were charged."""
    return prices.change(id, body, match)


@routes.delete("/prices/{id}", needs=WRITE, raises=("not_found", "precondition_failed", "invalid_state"))
def delete_price(id: str, match: IfMatch, prices: PriceList) -> None:
    """Remove a price; the built-in one, if there is one, holds again."""
    prices.delete(id, match)
