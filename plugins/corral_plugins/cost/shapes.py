"""The request and response bodies of the cost routes.

Money is in USD with six decimal places. Null means unknown, never zero.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Id, Instant, MomentIn, line, text_format
from corral_plugins.cost.api import MAX_TOKENS, Operation

Provider = Annotated[str, line(64)]
Model = Annotated[str, line(200)]
TimeZone = Annotated[str, line(64)]
Days = Annotated[int, Meta(ge=1, le=365)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
MAX_USD = 1_000_000


class TokenSums(msgspec.Struct, kw_only=True):
    """Token counts. `input` excludes cache tokens."""

    input: int
    output: int
    cache_read: int
    cache_write: int


class CostTotals(msgspec.Struct, kw_only=True):
    """Costs and usage. Tokens without a known price are counted in `unpriced_tokens`, not in `cost_usd`."""

    cost_usd: float
    calls: int
    tokens: TokenSums
    unpriced_tokens: int


class ZoneQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The time zone of a report. `tz` is the IANA name of the zone in which days begin and end."""

    tz: TimeZone = "UTC"


class CostSummary(msgspec.Struct, kw_only=True):
    """Total costs. Weeks begin on Monday.

    `change_percent` compares this month with the whole of last month. `total_usd`, the token counts, the unpriced
    usage, the wasted costs and the costs per task cover all time.
    """

    today_usd: float
    week_usd: float
    month_usd: float
    last_month_usd: float
    total_usd: float
    change_percent: float | None
    tokens: TokenSums
    unpriced_tokens: int
    unpriced_calls: int
    wasted_usd: float
    cost_per_completed_task_usd: float | None
    as_of: Instant


class DailyQuery(ZoneQuery, kw_only=True, forbid_unknown_fields=True):
    """The options of the daily report, which covers the last `days` days including today.

    The report can be limited to one agent, one provider, or both.
    """

    days: Days = 30
    agent_id: Id | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET


class DayCost(CostTotals, kw_only=True):
    """The costs for one day."""

    date: str


class DailyCosts(msgspec.Struct, kw_only=True):
    """The costs for each day, oldest first. Days without costs are included with zero costs."""

    items: list[DayCost]


class DaysQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options of a report on the last `days` days in UTC, including today."""

    days: Days = 30


class AgentCost(CostTotals, kw_only=True):
    """The costs of an agent. If `agent_id` is null, the costs were not caused by an agent.

    `tasks` counts each task once, on the day of its first cost. `budget` is the agent's own budget.
    """

    agent_id: str | None
    name: str | None
    deleted: bool
    tasks: int
    cost_per_completed_task_usd: float | None
    budget: float | None


class CostsByAgent(msgspec.Struct, kw_only=True):
    """Costs by agent, most expensive first."""

    items: list[AgentCost]
    total_usd: float


class ModelCost(CostTotals, kw_only=True):
    """The costs of one model of a provider."""

    model: str


class ProviderCost(CostTotals, kw_only=True):
    """The costs of a provider. `models` contains the costs of its models, most expensive first."""

    provider: str
    models: list[ModelCost]


class CostsByProvider(msgspec.Struct, kw_only=True):
    """Costs by provider, most expensive first."""

    items: list[ProviderCost]
    total_usd: float


class RankedQuery(DaysQuery, kw_only=True, forbid_unknown_fields=True):
    """The options of a paginated report on the last `days` days in UTC, including today."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    offset: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class TaskCost(CostTotals, kw_only=True):
    """The costs of a task in the period of the report."""

    task_id: str


class WorkflowCost(CostTotals, kw_only=True):
    """The costs of a workflow's runs."""

    workflow_id: str


class UserCost(CostTotals, kw_only=True):
    """The costs of a user. If `user_id` is null, the costs were not caused by a user."""

    user_id: str | None
    name: str | None


class ModelRank(ModelCost, kw_only=True):
    """The costs of a model, together with the name of its provider."""

    provider: str


class CostEventQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for the list of cost events. `since` is inclusive, `until` is exclusive."""

    task_id: Id | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    user_id: Id | UnsetType = UNSET
    provider: Provider | UnsetType = UNSET
    model: Model | UnsetType = UNSET
    since: MomentIn | UnsetType = UNSET
    until: MomentIn | UnsetType = UNSET


class CostEventView(msgspec.Struct, kw_only=True):
    """A cost event. `price_source` is `reported`, `table`, `override` or `zero`, or null if no price was known."""

    id: str
    ts: Instant
    usage_key: str
    user_id: str | None
    agent_id: str | None
    task_id: str | None
    attempt_id: str | None
    run_id: str | None
    conversation_id: str | None
    provider: str
    model: str
    operation: str
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float | None
    priced: bool
    price_source: str | None
    price_version: str | None
    estimated: bool
    note: str


class NewCostEvent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A cost incurred outside the gateway. `usage_key` identifies the cost within the installation.

    If the body, the `Corral-Lease` header or the token identifies a lease, the event belongs to that lease's attempt.
    Without a lease, only admins may record the cost. An admin corrects costs with an event whose `cost_usd` is
    negative.
    """

    usage_key: Annotated[str, line(200)]
    provider: Provider
    model: Annotated[str, line(200, 0)] = ""
    operation: Operation = "other"
    input_tokens: Count = 0
    output_tokens: Count = 0
    cache_read_tokens: Count = 0
    cache_write_tokens: Count = 0
    cost_usd: Annotated[float, Meta(ge=-MAX_USD, le=MAX_USD)] | None = None
    estimated: bool = False
    task_id: Id | None = None
    lease_id: Id | None = None
    agent_id: Id | None = None
    user_id: Id | None = None
    conversation_id: Id | None = None
    run_id: Id | None = None
    note: Annotated[str, line(500, 0)] = ""


Glob = r"^[A-Za-z0-9 ._:/@+*?-]+(?![\s\S])"
_GLOB_TEXT = "only letters, digits, spaces and the characters . _ : / @ + -, and the wildcards * and ?"
ProviderGlob = Annotated[str, text_format(Glob, _GLOB_TEXT, max_length=64)]
ModelGlob = Annotated[str, text_format(Glob, _GLOB_TEXT, max_length=200)]
Usd = Annotated[float, Meta(ge=0, le=MAX_USD)]


class NewPrice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A price per 1,000,000 tokens and per call that overrides the built-in price.

    `provider` and `model` are glob patterns (`*`, `?`) that ignore case. The most specific price applies: prices are
    compared first by the model, and then by the provider. An exact name is more specific than a pattern, and a pattern
    with more literal characters is more specific than one with fewer. Among equally specific prices, the one with the
    latest `valid_from` applies. If a cache price is missing, the input price applies to cache tokens.
    """

    provider: ProviderGlob
    model: ModelGlob
    input_usd: Usd
    output_usd: Usd
    cache_read_usd: Usd | None = None
    cache_write_usd: Usd | None = None
    per_call_usd: Usd = 0
    valid_from: MomentIn | None = None


class PriceChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to a price. Absent fields keep their values."""

    provider: ProviderGlob | UnsetType = UNSET
    model: ModelGlob | UnsetType = UNSET
    input_usd: Usd | UnsetType = UNSET
    output_usd: Usd | UnsetType = UNSET
    cache_read_usd: Usd | UnsetType | None = UNSET
    cache_write_usd: Usd | UnsetType | None = UNSET
    per_call_usd: Usd | UnsetType = UNSET
    valid_from: MomentIn | UnsetType = UNSET


class PriceView(msgspec.Struct, kw_only=True):
    """A price. `source` is `builtin` or `override`. Built-in prices have version 0 and cannot be changed."""

    id: str
    version: int
    provider: str
    model: str
    input_usd: float | None
    output_usd: float | None
    cache_read_usd: float | None
    cache_write_usd: float | None
    per_call_usd: float
    valid_from: Instant | None
    source: str


class PriceQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for the list of prices: the source of the price, and text that the provider or model must contain."""

    source: Literal["builtin", "override"] | UnsetType = UNSET
    provider: Annotated[str, line(64, 0)] = ""
    model: Annotated[str, line(200, 0)] = ""


class LookupQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Selects the price of a provider's model at the instant `at`, by default the current time."""

    provider: Provider
    model: Model
    at: MomentIn | UnsetType = UNSET


class FoundPrice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The price that applies to a model. `price_source` is `override`, `table` or `zero`.

    If no price is known, the response contains only `priced: false`. Fields without a value are omitted.
    """

    priced: bool
    price_source: str | None = None
    price_version: str | None = None
    price_id: str | None = None
    input_usd: float | None = None
    output_usd: float | None = None
    cache_read_usd: float | None = None
    cache_write_usd: float | None = None
    per_call_usd: float | None = None
    valid_from: Instant | None = None


Limit = Annotated[float, Meta(ge=0, le=1_000_000_000)]
Mode = Literal["hard", "soft", "off"]
OnExceeded = Literal["finish_running", "cancel_running"]


class BudgetChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to the budget. Absent fields keep their values.

    A `monthly_limit` of null means no limit; a limit of 0 forbids all uses that cost money. The mode `soft` sends
    alerts but blocks nothing, and `off` ignores the limit. `on_exceeded` determines whether running attempts may still
    use the money reserved for them, or are cancelled. Months begin and end in `timezone`.
    """

    monthly_limit: Limit | UnsetType | None = UNSET
    alert_thresholds: Annotated[list[Annotated[int, Meta(ge=1, le=200)]], Meta(max_length=10)] | UnsetType = UNSET
    mode: Mode | UnsetType = UNSET
    on_exceeded: OnExceeded | UnsetType = UNSET
    timezone: TimeZone | UnsetType = UNSET


class AgentBudgetView(msgspec.Struct, kw_only=True):
    """An agent's budget, and the amounts that the agent has spent and reserved in the current period, in USD."""

    agent_id: str
    limit: float
    spent: float
    reserved: float


class BudgetAlertView(msgspec.Struct, kw_only=True):
    """An alert that was sent in the current period. `scope` is `global` or `agent`."""

    scope: str
    agent_id: str | None
    threshold: int
    sent_at: Instant


class BudgetView(msgspec.Struct, kw_only=True):
    """The budget of the installation, and its state in the current period.

    `percent` is the percentage of the limit that was spent. `remaining_usd` is the amount that is neither spent nor
    reserved. `projected_usd` extrapolates the mean daily cost of the last 7 days. `by_agent` lists at most 200 agents
    that have their own budget.
    """

    version: int
    monthly_limit: float | None
    alert_thresholds: list[int]
    mode: str
    on_exceeded: str
    timezone: str
    period_start: Instant
    period_end: Instant
    spent_usd: float
    reserved_usd: float
    remaining_usd: float | None
    percent: float | None
    projected_usd: float
    status: str
    by_agent: list[AgentBudgetView]
    alerts_sent: list[BudgetAlertView]


class ReservationQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options for listing reservations."""


class ReservationView(msgspec.Struct, kw_only=True):
    """Money reserved for an attempt, or for a call without a task. `used_usd` is the amount spent so far."""

    id: str
    holder: str
    holder_id: str
    agent_id: str | None
    task_id: str | None
    amount_usd: float
    used_usd: float
    created_at: Instant
    expires_at: Instant
