"""HTTP routes for cost accounting."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Conflict
from corral.http.answers import Answer, IfMatch, Request
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.cost.service.installation_budget import Budgets
from corral_plugins.cost.service.ledger import CostLedger
from corral_plugins.cost.service.price_overrides import PriceOverrides
from corral_plugins.cost.service.reported_costs import ReportedCosts
from corral_plugins.cost.service.reports import CostReports
from corral_plugins.cost.shapes import (
    BudgetChange,
    BudgetView,
    CostEventQuery,
    CostEventView,
    CostsByAgent,
    CostsByProvider,
    CostSummary,
    DailyCosts,
    DailyQuery,
    DaysQuery,
    FoundPrice,
    LookupQuery,
    ModelRank,
    NewCostEvent,
    NewPrice,
    PriceChange,
    PriceQuery,
    PriceView,
    RankedQuery,
    ReservationQuery,
    ReservationView,
    TaskCost,
    UserCost,
    WorkflowCost,
    ZoneQuery,
)

routes = Routes("/cost", tag="Cost Management")

READ, WRITE = "cost.read", "cost.write"


@routes.get("/summary", needs=READ)
def get_cost_summary(query: ZoneQuery, reports: CostReports) -> CostSummary:
    """Return the total costs for today, this week, this month, last month and all time."""
    return reports.get_summary(query)


@routes.get("/daily", needs=READ)
def get_daily_cost(query: DailyQuery, reports: CostReports) -> DailyCosts:
    """Return the costs for each of the last `days` days, oldest first."""
    return reports.list_by_day(query)


@routes.get("/by-agent", needs=READ)
def get_cost_by_agent(query: DaysQuery, reports: CostReports) -> CostsByAgent:
    """Return the cost of each agent in the last `days` days, most expensive first."""
    return reports.list_by_agent(query)


@routes.get("/by-provider", needs=READ)
def get_cost_by_provider(query: DaysQuery, reports: CostReports) -> CostsByProvider:
    """Return the cost of each provider and of each of its models in the last `days` days, most expensive first."""
    return reports.list_by_provider(query)


@routes.get("/by-model", needs=READ)
def get_cost_by_model(query: RankedQuery, reports: CostReports) -> Page[ModelRank]:
    """List the cost of each model in the last `days` days, most expensive first."""
    return reports.list_by_model(query)


@routes.get("/by-task", needs=READ)
def get_cost_by_task(query: RankedQuery, reports: CostReports) -> Page[TaskCost]:
    """List the cost of each task in the last `days` days, most expensive first."""
    return reports.list_by_task(query)


@routes.get("/by-workflow", needs=READ)
def get_cost_by_workflow(query: RankedQuery, reports: CostReports) -> Page[WorkflowCost]:
    """List the cost of each workflow's runs in the last `days` days, most expensive first."""
    return reports.list_by_workflow(query)


@routes.get("/by-user", needs=WRITE)
def get_cost_by_user(query: RankedQuery, reports: CostReports) -> Page[UserCost]:
    """List the cost of each user in the last `days` days, most expensive first."""
    return reports.list_by_user(query)


@routes.get("/budget", needs=READ)
def get_budget(budgets: Budgets) -> BudgetView:
    """Return the budget, and the amounts spent and reserved in the current month."""
    return budgets.get()


@routes.put("/budget", needs=WRITE, raises=("precondition_failed", "invalid_state"))
def update_budget(body: BudgetChange, match: IfMatch, budgets: Budgets) -> BudgetView:
    """Change the budget. The change takes effect immediately and also applies to the current month."""
    return budgets.change(body, match)


@routes.get("/reservations", needs=WRITE, raises=("invalid_cursor",))
def list_reservations(query: ReservationQuery, budgets: Budgets, caller: Principal) -> Page[ReservationView]:
    """List the reservations of money for running attempts and calls, newest first."""
    return budgets.list_reservations(query, caller)


@routes.get("/events", needs=READ, raises=("invalid_cursor",))
def list_cost_events(query: CostEventQuery, ledger: CostLedger, caller: Principal) -> Page[CostEventView]:
    """List cost events, newest first.

    Admins see all events. Other users do not see the costs of other users' conversations and direct calls.
    """
    return ledger.list_events(query, caller)


@routes.get("/events/{id}", needs=READ, raises=("not_found",))
def get_cost_event(id: str, ledger: CostLedger, caller: Principal) -> CostEventView:
    """Return a cost event."""
    return ledger.get_visible_event(id, caller)


@routes.post("/events", needs=("cost.report", WRITE), status=201, raises=("forbidden", "lease_lost"))
async def create_cost_event(
    body: NewCostEvent, reported: ReportedCosts, caller: Principal, request: Request, work: Work
) -> Answer[CostEventView]:
    """Record costs incurred outside the gateway, or correct recorded costs.

    If an event with the same `usage_key` exists, nothing is added, and the response is 200 with the existing event. If
    the caller's lease has ended, the event is still recorded, but the response is 409 `lease_lost`.
    """
    requested = body.lease_id or request.header("corral-lease")
    lease_id = requested.lower() if requested is not None else caller.lease_id
    recorded = await work(lambda: reported.record_report(body, lease_id, caller), entry=request.unit_context(caller))
    if recorded.lease_ended:
        raise Conflict("The lease has ended; stop the run. The reported cost was recorded.", code="lease_lost")
    return Answer(body=recorded.event, status=201 if recorded.is_new else 200)


@routes.get("/prices", needs=READ, raises=("invalid_cursor",))
def list_prices(query: PriceQuery, prices: PriceOverrides, caller: Principal) -> Page[PriceView]:
    """List price overrides, newest first, followed by the built-in prices."""
    return prices.list_prices(query, caller)


@routes.post("/prices", needs=WRITE, status=201, raises=("duplicate", "quota_exceeded"))
def create_price(body: NewPrice, prices: PriceOverrides) -> PriceView:
    """Create a price that overrides the built-in price."""
    return prices.create(body)


@routes.get("/prices/lookup", needs=READ)
def look_up_price(query: LookupQuery, prices: PriceOverrides) -> FoundPrice:
    """Return the price that applies to a model, and its source."""
    return prices.look_up(query)


@routes.put("/prices/{id}", needs=WRITE, raises=("not_found", "duplicate", "precondition_failed", "invalid_state"))
def update_price(id: str, body: PriceChange, match: IfMatch, prices: PriceOverrides) -> PriceView:
    """Change a price. Existing cost events keep their cost."""
    return prices.change(id, body, match)


@routes.delete("/prices/{id}", needs=WRITE, raises=("not_found", "precondition_failed", "invalid_state"))
def delete_price(id: str, match: IfMatch, prices: PriceOverrides) -> None:
    """Delete a price override. The built-in price, if any, applies again."""
    prices.delete(id, match)
