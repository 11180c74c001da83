"""Metrics of the egress guard and the redactor."""

from __future__ import annotations

from corral.egress.client import Egress
from corral.plugin import Metric
from corral.redact.patterns import BUILT_IN
from corral.redact.redactor import Redactor

SINKS = (
    "channel",
    "http_step",
    "import",
    "llm",
    "local_model",
    "mail",
    "mcp",
    "template_index",
    "tool",
    "trigger",
    "webhook",
)
OUTCOMES = ("answered", "blocked", "failed", "timed_out")

Series = dict[tuple[str, ...], float]


def _requests(egress: Egress) -> Series:
    return {labels: float(count) for labels, count in egress.requests.copy().items()}


def _blocked(egress: Egress) -> Series:
    return {(sink,): float(count) for (sink, outcome), count in egress.requests.copy().items() if outcome == "blocked"}


def _redactions(redactor: Redactor) -> Series:
    return {(kind,): float(count) for kind, count in redactor.counts.copy().items()}


def _values(redactor: Redactor) -> Series:
    return {(): float(redactor.values)}


METRICS = (
    Metric(
        name="corral_egress_requests_total",
        help="Number of outgoing requests.",
        kind="counter",
        labels={"sink": SINKS, "outcome": OUTCOMES},
        collect=_requests,
    ),
    Metric(
        name="corral_egress_blocked_total",
        help="Number of outgoing requests that the egress guard refused.",
        kind="counter",
        labels={"sink": SINKS},
        collect=_blocked,
    ),
    Metric(
        name="corral_redactions_total",
        help="Number of credentials redacted from text.",
        kind="counter",
        labels={"kind": sorted({"value", *(pattern.kind for pattern in BUILT_IN)})},
        collect=_redactions,
    ),
    Metric(name="corral_redactor_values", help="Number of credentials that the redactor knows.", collect=_values),
)
