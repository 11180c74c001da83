"""Metrics of the gateway, collected since this process started. Only the event loop updates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from corral.metrics.histogram import Histogram
from corral.plugin import Metric
from corral_plugins.llm.service.calls import CallOutcome
from corral_plugins.llm.service.slots import ConcurrencySlots

STATUSES = ("completed", "failed", "cancelled")
FIRST_TOKEN_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DIRECTIONS = ("input", "output", "cache_read", "cache_write")


class CallMetrics:
    """Collects metrics of model calls by provider: calls, cost, tokens, times to the first token, and fallbacks."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, ...]] = Counter()
        self._cost_micro_usd: Counter[tuple[str, ...]] = Counter()
        self._tokens: Counter[tuple[str, ...]] = Counter()
        self._fallbacks: Counter[tuple[str, ...]] = Counter()
        self._first_token_seconds = Histogram(FIRST_TOKEN_BOUNDS)

    def add_call(self, outcome: CallOutcome) -> None:
        """Count a call that has ended, and record its cost, its tokens and the time until its first token."""
        provider, tokens = outcome.target.provider.name, outcome.tokens
        self._calls[(provider, outcome.status)] += 1
        self._cost_micro_usd[(provider,)] += outcome.cost_micro_usd or 0
        for direction in DIRECTIONS:
            self._tokens[(provider, direction)] += getattr(tokens, f"{direction}_tokens")
        if outcome.first_token_ms is not None:
            self._first_token_seconds.observe(outcome.first_token_ms / 1000, (provider,))

    def add_fallback(self, provider: str) -> None:
        """Count a fallback from a model of this provider to another model."""
        self._fallbacks[(provider,)] += 1

    def definitions(self, providers: Sequence[str]) -> list[Metric]:
        """Return the metric definitions. `providers` are the possible values of the `provider` label."""
        labels = {"provider": providers}
        return [
            *self._counters(labels),
            Metric(
                name="corral_llm_first_token_seconds",
                help="Time from the request to the first token of streamed responses, in seconds.",
                kind="histogram",
                labels=labels,
                collect=self._first_token_seconds.read,
            ),
            Metric(
                name="corral_llm_queue",
                help="Number of model calls that are waiting for a concurrency slot.",
                labels=labels,
                collect=_waiting_calls,
            ),
        ]

    def _counters(self, labels: Mapping[str, Sequence[str]]) -> list[Metric]:
        return [
            Metric(
                name="corral_llm_calls_total",
                help="Number of calls to models, by provider and outcome.",
                kind="counter",
                labels={**labels, "outcome": STATUSES},
                collect=lambda: self._calls,
            ),
            Metric(
                name="corral_llm_cost_usd_total",
                help="Cost of calls to models, in USD.",
                kind="counter",
                labels=labels,
                collect=lambda: {provider: micro / 1_000_000 for provider, micro in self._cost_micro_usd.items()},
            ),
            Metric(
                name="corral_llm_tokens_total",
                help="Number of tokens in calls to models, by provider and direction.",
                kind="counter",
                labels={**labels, "direction": DIRECTIONS},
                collect=lambda: self._tokens,
            ),
            Metric(
                name="corral_llm_fallbacks_total",
                help="Number of model calls that fell back to another model, by the provider that failed.",
                kind="counter",
                labels=labels,
                collect=lambda: self._fallbacks,
            ),
        ]


def _waiting_calls(slots: ConcurrencySlots) -> dict[tuple[str, ...], float]:
    return slots.waiting_calls()
