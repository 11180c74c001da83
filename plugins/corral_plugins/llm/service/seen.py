"""Counts of this process since its start, for metrics. Only the event loop writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

OUTCOMES = ("completed", "failed", "cancelled")
DIRECTIONS = ("input", "output", "cache_read", "cache_write")
Labelled = Mapping[tuple[str, ...], float]


class Seen:
    """Calls, money, tokens, waits and fallbacks, by provider."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, ...]] = Counter()
        self._cost: Counter[tuple[str, ...]] = Counter()
        self._tokens: Counter[tuple[str, ...]] = Counter()
        self._fallbacks: Counter[tuple[str, ...]] = Counter()
        self._first_ms: Counter[tuple[str, ...]] = Counter()
        self._first_count: Counter[tuple[str, ...]] = Counter()

    def ended(self, provider: str, outcome: str, tokens: tuple[int, ...], micro_usd: int | None) -> None:
        """A call was settled; `tokens` in the order of `DIRECTIONS`."""
        self._calls[(provider, outcome)] += 1
        self._cost[(provider,)] += micro_usd or 0
        for direction, n in zip(DIRECTIONS, tokens, strict=True):
            self._tokens[(provider, direction)] += n

    def first_token(self, provider: str, milliseconds: int) -> None:
        """A stream began."""
        self._first_ms[(provider,)] += milliseconds
        self._first_count[(provider,)] += 1

    def fell_back(self, provider: str) -> None:
        """A call went on to another model than this provider's."""
        self._fallbacks[(provider,)] += 1

    def calls(self) -> Labelled:
        """By provider and outcome."""
        return self._calls

    def cost_usd(self) -> Labelled:
        """By provider."""
        return {labels: micro / 1_000_000 for labels, micro in self._cost.items()}

    def tokens(self) -> Labelled:
        """By provider and direction."""
        return self._tokens

    def fallbacks(self) -> Labelled:
        """By provider."""
        return self._fallbacks

    def first_token_seconds(self) -> Labelled:
        """The mean of the streams so far, by provider."""
        return {labels: self._first_ms[labels] / n / 1000 for labels, n in self._first_count.items()}
