"""The metrics of the `ssh` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.metrics.histogram import LONG_SECONDS, Histogram
from corral.plugin import Metric

OUTCOMES = ("completed", "failed", "timed_out", "cancelled", "denied")


class SshMetrics:
    """Counts the commands that this process runs."""

    def __init__(self) -> None:
        self._outcomes: Counter[tuple[str, ...]] = Counter()
        self._seconds = Histogram(LONG_SECONDS)

    def count(self, outcome: str, seconds: float | None = None) -> None:
        """Count a command by its outcome. `seconds` is the number of seconds for which the command ran."""
        self._outcomes[(outcome,)] += 1
        if seconds is not None:
            self._seconds.observe(seconds)

    def definitions(self) -> list[Metric]:
        """Return the definitions of all SSH metrics."""
        return [
            Metric(
                name="corral_ssh_executions_total",
                help="Number of commands run over SSH, by outcome.",
                kind="counter",
                labels={"outcome": OUTCOMES},
                collect=self._read_outcomes,
            ),
            Metric(
                name="corral_ssh_seconds",
                help="Duration of commands run over SSH, in seconds.",
                kind="histogram",
                collect=self._seconds.read,
            ),
        ]

    def _read_outcomes(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._outcomes.items()}
