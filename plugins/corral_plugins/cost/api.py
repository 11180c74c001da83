"""The public API of cost accounting: uses of paid services, quotes, charges and the `Costs` service."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, Protocol

import msgspec

Operation = Literal["chat", "embedding", "image", "tool", "other"]
PriceSource = Literal["reported", "table", "override", "zero"]

MAX_TOKENS = 100_000_000
"""The maximum of each token count of an event. Larger counts are rejected."""
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
    """One use of a model or tool that may cost money. `usage_key` identifies the use; a repeated key has no effect.

    `cost_usd` is the cost reported by the provider, or None. `estimated` means that the token counts are estimates.
    `user_id` is the user on whose behalf the money was spent. If `by_gateway` is true, `usage_key` is the id of a call
    of the LLM gateway. Such keys never collide with the keys of other uses.
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
        """Whether a price is known."""
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


class Costs(Protocol):
    """Quotes prices and records cost events."""

    def quote(self, provider: str, model: str, tokens: TokenCounts, *, free: bool = False) -> PriceQuote:
        """Return the cost of a call at current prices.

        This method may also be called outside a unit of work. Price overrides that another process set then apply after
        at most 2 seconds.
        """
        ...

    def record_cost(self, spent: BillableUsage, *, free: bool = False) -> ChargedCost:
        """Store a cost event and update its rollups, in the caller's unit of work.

        Nothing is published in the event log. Raise `Invalid` for token counts below 0 or above `MAX_TOKENS`. The
        caller must update the counters of the task (`Tasks.record_usage`) with the returned `cost_usd`.
        """
        ...

    def spent_by_agents(self, agent_ids: Sequence[str]) -> dict[str, int]:
        """Return the costs of each of these agents in the current month (UTC), in micro-USD.

        Agents without costs are included as 0. Runs in the caller's unit of work.
        """
        ...

    def spent_on_task(self, task_id: str) -> int:
        """Return the cost of all attempts of a task in micro-USD. Runs in the caller's unit of work."""
        ...
