"""Metrics about circuit breakers. The counters are updated only on the event loop."""

from __future__ import annotations

from collections import Counter
from typing import Any

from corral.plugin import Metric
from corral_plugins.circuit_breakers.models import BreakerRow
from corral_plugins.circuit_breakers.service.configuration import OTHER

OUTCOMES = ("success", "failure", "slow", "neutral")
STATES = {"closed": 0, "half_open": 1, "open": 2}
HOST_KINDS = ("http", "webhook")
MAX_HOSTS = 50


class BreakerMetrics:
    """Counts calls, rejections and transitions by the kind of circuit breaker or, if it guards a host, by the host."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._hosts = 0
        self._calls: Counter[tuple[str, ...]] = Counter()
        self._rejected: Counter[tuple[str, ...]] = Counter()
        self._transitions: Counter[tuple[str, ...]] = Counter()

    def allow_kind(self, kind: str) -> None:
        """Allow a kind of circuit breaker as a value of the label `breaker`.

        For a kind that guards hosts, allow `<kind>:other` instead.
        """
        label = f"{kind}:{OTHER}" if kind in HOST_KINDS else kind
        if label not in self.labels:
            self.labels.append(label)

    def label(self, name: str) -> str:
        """Return the metric label of a circuit breaker.

        The first 50 hosts have their own labels; all further hosts share one.
        """
        kind = name.partition(":")[0]
        if kind not in HOST_KINDS or name in self.labels:
            return name if kind in HOST_KINDS else kind
        if self._hosts == MAX_HOSTS:
            return f"{kind}:{OTHER}"
        self._hosts += 1
        self.labels.append(name)
        return name

    def count_call(self, name: str, outcome: str) -> None:
        """Count a call that a circuit breaker admitted."""
        self._calls[(self.label(name), outcome)] += 1

    def count_rejection(self, name: str) -> None:
        """Count a call that a circuit breaker rejected."""
        self._rejected[(self.label(name),)] += 1

    def count_transition(self, name: str, to: str) -> None:
        """Count a change of a circuit breaker's state made by this process."""
        self._transitions[(self.label(name), to)] += 1

    def _read_states(self) -> dict[tuple[str, ...], float]:
        """Return, for each label, the highest state of its circuit breakers: 0 (closed), 1 (half open) or 2 (open)."""
        found: dict[tuple[str, ...], float] = {}
        rows: Any = BreakerRow.select(BreakerRow.name, BreakerRow.state).tuples()
        for name, state in rows:
            label = (self.label(name),)
            found[label] = max(found.get(label, 0.0), float(STATES[state]))
        return found

    def definitions(self) -> list[Metric]:
        """Return the definitions of the metrics."""
        breaker = {"breaker": self.labels}
        return [
            Metric(
                name="corral_breaker_state",
                help="Highest state among the circuit breakers with the same value of the label breaker: 0 for "
                "closed, 1 for half-open, 2 for open.",
                labels=breaker,
                collect=self._read_states,
            ),
            Metric(
                name="corral_breaker_calls_total",
                help="Number of calls made through circuit breakers, by outcome.",
                kind="counter",
                labels={**breaker, "outcome": OUTCOMES},
                collect=lambda: self._calls,
            ),
            Metric(
                name="corral_breaker_rejected_total",
                help="Number of calls that a circuit breaker rejected.",
                kind="counter",
                labels=breaker,
                collect=lambda: self._rejected,
            ),
            Metric(
                name="corral_breaker_transitions_total",
                help="Number of circuit breaker transitions by new state.",
                kind="counter",
                labels={**breaker, "to": tuple(STATES)},
                collect=lambda: self._transitions,
            ),
        ]
