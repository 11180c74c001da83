"""What other plugins may know of costs: what was used, what it is charged with, and the service `Cost`."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, Protocol

import msgspec

Operation = Literal["chat", "embedding", "image", "tool", "other"]
PriceSource = Literal["reported", "table", "override", "zero"]

MAX_TOKENS = 100_000_000
"""More tokens than this in one event are a mistake of the caller."""
FREE_PROVIDERS = frozenset({"local", "scripted", "builtin"})
"""Providers that cost nothing whatever the tables say; kinds that declare `free` pass `free=True` besides."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one call. `input_tokens` exclude both kinds of cache tokens, whatever the provider's own habit."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.input_tokens + self.output_tokens + self.cache_read_tokens + self.cache_write_tokens


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """One use of money. `usage_key` names it for ever: the same key again adds nothing.

    `cost_usd` is what the provider says that it cost (None: it does not say). `estimated`: the counts are not the
    provider's. `user_id` is the person whose money it is. `by_gateway`: the key is the id of a call that the gateway
    made; a report with the same key is another event.
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
        """Its counts."""
        return Tokens(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cache_read_tokens=self.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens,
        )


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What a use costs. `cost_micro_usd` None: nobody knows a price, which is never zero."""

    cost_micro_usd: int | None
    priced: bool
    price_source: PriceSource | None
    price_version: str | None = None

    @property
    def cost_usd(self) -> float | None:
        """The same in USD, as JSON shows it."""
        return None if self.cost_micro_usd is None else self.cost_micro_usd / 1e6


class Charged(Quote, frozen=True, kw_only=True):
    """A cost event. `repeated`: its key was known, so nothing was added and the first one is told."""

    event_id: str
    repeated: bool = False


class Cost(Protocol):
    """Prices and cost events."""

    def price(self, provider: str, model: str, tokens: Tokens, *, free: bool = False) -> Quote:
        """What a call would cost by today's prices.

        Needs no unit and does no I/O: overrides of another process count after at most 2 s. Until the built-in table is
        loaded (a moment after the start) a price that only it knows is not known.
        """
        ...

    def settle(self, spent: Spent, *, free: bool = False) -> Charged:
        """Write the cost event in the caller's unit and add it to all sums. Emits nothing.

        Counts below 0 or above `MAX_TOKENS` are `Invalid`. The task's own tally is the caller's to tell
        (`Tasks.spent`), with `cost_usd` of the answer.
        """
        ...

    def spent_on_task(self, task_id: str) -> int:
        """Micro-USD that all attempts of a task have cost; joins the caller's unit."""
        ...
