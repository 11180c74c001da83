"""The public API of cost accounting: usage of paid services, prices, budgets, the `Costs` service and the events."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal, Protocol

import msgspec

from corral.database.model import ADMIN
from corral.errors import Problem, declare_codes
from corral.events.event import Event

declare_codes(
    {
        "budget_exceeded": (
            402,
            "The budget forbids this call",
            "Raise the budget, or wait until the budget period ends.",
        )
    }
)

Operation = Literal["chat", "embedding", "image", "tool", "other"]
PriceSource = Literal["reported", "table", "override", "zero"]
BudgetScope = Literal["global", "agent", "task"]

MAX_TOKENS = 100_000_000
"""The maximum value of each token count in an event. Larger counts are rejected."""
FREE_PROVIDERS = frozenset({"local", "scripted", "builtin"})
"""Providers whose use never costs anything. For other free providers, callers pass `free=True`."""


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one call. `input_tokens` excludes cache tokens, even if the provider counts them as input."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def total(self) -> int:
        """The sum of all token counts."""
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens


class BillableUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One use of a model or tool that may cost money.

    `usage_key` identifies the use; a use whose key was recorded before is ignored.

    `cost_usd` is the cost reported by the provider, or None. `estimated` means that the token counts are estimates.
    `user_id` is the user on whose behalf the money was spent. If `by_gateway` is true, `usage_key` is the id of an LLM
    gateway call. The keys of gateway calls never collide with other keys.
    """

    usage_key: str
    provider: str
    model: str
    operation: Operation = "chat"
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: Decimal | None = None
    estimated: bool = False
    user_id: str | None = None
    agent_id: str | None = None
    task_id: str | None = None
    attempt_id: str | None = None
    run_id: str | None = None
    conversation_id: str | None = None
    note: str = ""
    by_gateway: bool = False

    @property
    def tokens(self) -> TokenCounts:
        """The token counts as a `TokenCounts` object."""
        return TokenCounts(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cache_read_tokens=self.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens,
        )


class PriceQuote(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one use of a model or tool. `cost_micro_usd` is None, not zero, if no price is known."""

    cost_micro_usd: int | None
    price_source: PriceSource | None
    price_version: str | None = None

    @property
    def priced(self) -> bool:
        """Whether the price of the use is known."""
        return self.cost_micro_usd is not None

    @property
    def cost_usd(self) -> float | None:
        """The cost in USD as shown in JSON, or None if no price is known."""
        return None if self.cost_micro_usd is None else self.cost_micro_usd / 1e6


class ChargedCost(PriceQuote, frozen=True, kw_only=True):
    """The result of recording a cost: the price that was charged, and the id of the cost event.

    If `repeated` is true, an event with the same usage key already existed. Nothing was added, and this object
    describes the existing event.
    """

    event_id: str
    repeated: bool = False


class BudgetShortage(msgspec.Struct, frozen=True, kw_only=True):
    """The maximum cost of a refused call to a model or tool, and the amount left in the budget, both in micro-USD."""

    needed: int
    left: int


class BudgetRefused(Problem):
    """Raised if a call to a model or tool is refused because of a budget.

    The problem code in responses is `budget_exceeded`, with the additional member `scope`. If a specific amount was
    refused, the members `needed_usd` and `left_usd` are present as well.
    """

    def __init__(self, scope: BudgetScope, detail: str, shortage: BudgetShortage | None = None) -> None:
        amounts: dict[str, Any] = {}
        if shortage is not None:
            amounts = {"needed_usd": shortage.needed / 1e6, "left_usd": max(0, shortage.left) / 1e6}
        super().__init__(detail, code="budget_exceeded", scope=scope, **amounts)
        self.scope, self.shortage = scope, shortage


def format_micro_usd(amount: int) -> str:
    """Return an amount in micro-USD as text with two to six decimals, such as `$0.0605`.

    Negative amounts are shown as 0.
    """
    whole, _, fraction = f"{max(0, amount) / 1e6:.6f}".partition(".")
    return f"${whole}.{fraction.rstrip('0').ljust(2, '0')}"


class NewReservation(msgspec.Struct, frozen=True, kw_only=True):
    """A request to reserve money.

    `holder_id` is the id of an attempt or of a gateway call. The reservation of an attempt names its task and its
    lease, and calls under this lease use money from the reservation. `attempt_limit_micro_usd` is the amount that the
    task's cost limit leaves for the attempt, or None if the task has no cost limit. The reservation is released after
    `expires_at`, unless the lease of its attempt was renewed.
    """

    holder: Literal["attempt", "call"]
    holder_id: str
    amount_micro_usd: int
    expires_at: str
    agent_id: str | None = None
    task_id: str | None = None
    lease_id: str | None = None
    attempt_limit_micro_usd: int | None = None


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a reservation that is set aside for one call to the LLM gateway until the call ends."""

    holder_id: str
    amount_micro_usd: int


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """The amounts left in the budgets, and the limits of the budgets, in micro-USD.

    None means that there is no limit.
    """

    overall: int | None = None
    agent: int | None = None
    overall_limit: int | None = None
    agent_limit: int | None = None


class AgentBudget(msgspec.Struct, frozen=True, kw_only=True):
    """An agent's own budget in the current period, in micro-USD.

    `is_exceeded` is true if the agent has used up its limit and no admin has lifted the limit for this period.
    """

    limit: int
    spent: int
    reserved: int
    is_exceeded: bool


class Costs(Protocol):
    """Quotes prices, reserves money, and records cost events.

    Budgets limit the costs of the installation and of individual agents in a calendar month. Money is reserved before
    it is spent, and a reservation succeeds only if the spent and reserved amounts together stay within every limit.
    Reserving money locks the counters of the budgets. To avoid deadlocks, callers lock all other rows before they
    reserve money.
    """

    def quote(self, provider: str, model: str, tokens: TokenCounts, *, free: bool = False) -> PriceQuote:
        """Return the cost of a call at current prices.

        This method may also be called outside a unit of work. In that case, price overrides set by another process take
        effect within 2 seconds.
        """
        ...

    def has_limits(self) -> bool:
        """Return whether any budget limit is set, according to the limits that this process has in memory.

        If another process sets the first limit, this process learns of it within 2 seconds. Calls are always checked
        against the limits in force.
        """
        ...

    def is_limited(self, agent_id: str | None) -> bool:
        """Return whether a budget requires money to be reserved before the agent's calls.

        A task with its own cost limit always needs a reservation.
        """
        ...

    def amount_to_reserve(self, quote: PriceQuote, estimate_micro_usd: int | None = None) -> int:
        """Return the amount to reserve for a use: the estimate if one is given, or else the cost in the quote.

        The amount is 0 for free uses, so every budget allows them. For uses without a known price, it is the smallest
        possible amount, so a budget allows them until nothing is left. Raise `BudgetRefused` if the setting
        `cost.unpriced` forbids uses without a price.
        """
        ...

    def default_attempt_micro_usd(self) -> int:
        """Return the amount to reserve for an attempt whose costs are unknown."""
        ...

    def headroom(self, agent_id: str | None) -> Headroom:
        """Return the amounts left in the budgets of the installation and of the agent. They may change at any time."""
        ...

    def reserve(self, wanted: NewReservation) -> Hold | None:
        """Reserve money. Return None if the amount is 0 or no limit applies.

        Raise `BudgetRefused` if a budget does not allow the amount; the caller must then roll back its unit of work.
        """
        ...

    def draw(self, wanted: NewReservation) -> Hold | None:
        """Set aside part of an attempt's reservation for a call under the attempt's lease.

        `wanted` contains the attempt and the amount for the call. If the reservation is too small, it is enlarged
        first, which may raise `BudgetRefused` as in `reserve`.
        """
        ...

    def record_cost(self, spent: BillableUsage, *, free: bool = False, hold: Hold | None = None) -> ChargedCost:
        """Store a cost event and update the affected rollups and counters, in the caller's unit of work.

        The cost replaces the amount that `hold` has set aside. Raise `Invalid` for token counts below 0 or above
        `MAX_TOKENS`. The caller must update the counters of the task (`Tasks.record_usage`) with the returned
        `cost_usd`.
        """
        ...

    def release(self, hold: Hold | None) -> None:
        """Release the amount that was set aside for a call that cost nothing."""
        ...

    def release_attempt(self, attempt_id: str, *, is_capped: bool) -> None:
        """Release the unused part of an attempt's reservation. Does nothing if the attempt has no reservation.

        `is_capped` is true if the task of the attempt has a cost limit.
        """
        ...

    def spent_by_agents(self, agent_ids: Sequence[str]) -> dict[str, int]:
        """Return each agent's costs in the current month (UTC), in micro-USD.

        Agents without costs have the value 0. Runs in the caller's unit of work.
        """
        ...

    def spent_on_task(self, task_id: str) -> int:
        """Return the cost of all attempts of a task in micro-USD. Runs in the caller's unit of work."""
        ...

    def set_agent_limit(self, agent_id: str, limit_micro_usd: int | None) -> None:
        """Set or remove the monthly budget of an agent. The change takes effect in the current period."""
        ...

    def lift_agent_limit(self, agent_id: str) -> None:
        """Suspend the budget of an agent for the rest of the current budget period."""
        ...

    def agent_budgets(self, agent_ids: Sequence[str]) -> dict[str, AgentBudget]:
        """Return the given agents' budgets in the current period. Agents without a budget are omitted."""
        ...


class BudgetThresholdReached(Event, kw_only=True):
    """The costs of the installation or of an agent reached an alert threshold of the budget."""

    event = "budget.threshold"
    visibility = ADMIN

    scope: str
    agent_id: str | None
    threshold: int
    percent: float
    spent_usd: float
    limit_usd: float


class BudgetExceeded(Event, kw_only=True):
    """The costs of the installation or of an agent reached the limit of the budget."""

    event = "budget.exceeded"
    visibility = ADMIN

    scope: str
    agent_id: str | None
    spent_usd: float
    limit_usd: float


class BudgetChanged(Event, kw_only=True):
    """The budget was changed or a new period began, so tasks waiting because of the budget may be claimable again."""

    event = "budget.changed"
    visibility = ADMIN

    monthly_limit_usd: float | None


EVENTS: tuple[type[Event], ...] = (BudgetThresholdReached, BudgetExceeded, BudgetChanged)
