"""Counts of this process since its start, for metrics. Counted once their unit is committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.database.unit import after_commit
from corral.metrics.histogram import SECONDS, Histogram
from corral_plugins.tools.service.registry import Known

DECISIONS = ("allowed", "denied")
OTHER = "other"


class Figures:
    """Calls by tool and decision, the time they took, runs that were tainted. Only plugins' tools are named."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._calls: Counter[tuple[str, ...]] = Counter()
        self.seconds = Histogram((*SECONDS, 60.0, 300.0, 600.0))
        self._tainted = 0

    def decided(self, known: Known | None, decision: str) -> None:
        """A call was allowed or denied."""
        self._count(self._calls, (_name(known), decision), 1)

    def ended(self, known: Known | None, duration_ms: int) -> None:
        """A call ended after so long."""
        after_commit(lambda: self.seconds.observe(duration_ms / 1000, (_name(known),)))

    def tainted(self) -> None:
        """A run received its first untrusted content."""
        after_commit(lambda: setattr(self, "_tainted", self._tainted + 1))

    @staticmethod
    def _count(counter: Counter[tuple[str, ...]], key: tuple[str, ...], n: float) -> None:
        after_commit(lambda: counter.update({key: n}))

    def calls(self) -> Mapping[tuple[str, ...], float]:
        """By tool and decision."""
        return self._calls

    def tainted_attempts(self) -> Mapping[tuple[str, ...], float]:
        """Attempts that received untrusted content."""
        return {(): self._tainted}


def _name(known: Known | None) -> str:
    return known.name if known is not None and known.source.startswith("plugin:") else OTHER
