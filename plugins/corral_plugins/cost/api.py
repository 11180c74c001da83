"""The public API of cost accounting: uses, quotes, charges and the service `Cost`."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, Protocol

import msgspec

Operation = Literal["chat", "embedding", "image", "tool", "other"]
PriceSource = Literal["reported", "table", "override", "zero"]

MAX_TOKENS = 100_000_000
"""The limit of each token count of an event; anything above is an error of the caller."""
FREE_PROVIDERS = frozenset({"local", "scripted", "builtin"})
"""Providers that never cost anything. Callers pass `free=True` for other providers without costs."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one call. `input_tokens` excludes cache tokens, however the provider counts."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def total(self) -> int:
        """The sum of all counts."""
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """One use that costs money. `usage_key` identifies it permanently: the same key again has no effect.

    `cost_usd` is the cost reported by the provider, or None. `estimated`: the token counts are not the provider's.
    `user_id` is the user on whose behalf the money was spent. `by_gateway`: the key is the id of a call of the LLM
    gateway; a reported event with the same key is a different event.
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
    def tokens(self) -> Tokens:
        """The token counts."""
        return Tokens(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cache_read_tokens=self.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens,
        )


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a use. `cost_micro_usd` is None, not zero, if no price is known."""

    cost_micro_usd: int | None
    price_source: PriceSource | None
    price_version: str | None = None

    @property
    def priced(self) -> bool:
        """Whether a price is known."""
        return self.cost_micro_usd is not None

    @property
    def cost_usd(self) -> float | None:
        """The cost in USD, as shown in JSON."""
        return None if self.cost_micro_usd is None else self.cost_micro_usd / 1e6


class Charged(Quote, frozen=True, kw_only=True):
    """A recorded cost event. `repeated`: the key existed, so nothing was added and this is the existing event."""

    event_id: str
    repeated: bool = False


class Cost(Protocol):
    """Prices and cost events."""

    def price(self, provider: str, model: str, tokens: Tokens, *, free: bool = False) -> Quote:
        """Return what a call would cost now.

        May be called outside a unit: then price overrides set in another process apply after at most 2 s.
        """
        ...

    def settle(self, spent: Spent, *, free: bool = False) -> Charged:
        """Write the cost event and its rollups in the caller's unit. Emits no event.

        Raises `Invalid` for counts below 0 or above `MAX_TOKENS`. The caller updates the counters of the task
        (`Tasks.spent`) with the returned `cost_usd`.
        """
        ...

    def spent_on_task(self, task_id: str) -> int:
        """Return the cost of all attempts of a task in micro-USD; joins the caller's unit."""
        ...
