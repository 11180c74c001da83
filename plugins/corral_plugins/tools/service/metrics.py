"""Tool metrics since the start of this process. Values are counted when the unit of work commits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.database.unit import after_commit
from corral.metrics.histogram import SECONDS, Histogram
from corral_plugins.tools.service.registry import RegisteredTool

DECISIONS = ("allowed", "asked", "denied")
OTHER = "other"


class ToolMetrics:
    """Counts tool calls by tool and decision, measures their durations, and counts tainted attempts.

    Tools offered only by workers are counted as `other`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._calls: Counter[tuple[str, ...]] = Counter()
        self.seconds = Histogram((*SECONDS, 60.0, 300.0, 600.0))
        self._tainted = 0

    def count_decision(self, tool: RegisteredTool | None, decision: str) -> None:
        """Count a decision on a tool call."""
        key = (_label_of(tool), decision)
        after_commit(lambda: self._calls.update({key: 1}))

    def observe_duration(self, tool: RegisteredTool | None, duration_ms: int) -> None:
        """Record the duration of an ended call."""
        after_commit(lambda: self.seconds.observe(duration_ms / 1000, (_label_of(tool),)))

    def count_tainted_attempt(self) -> None:
        """Count an attempt as tainted when it receives its first untrusted content."""
        after_commit(lambda: setattr(self, "_tainted", self._tainted + 1))

    def calls_by_decision(self) -> Mapping[tuple[str, ...], float]:
        """Return the number of calls by tool and decision."""
        return self._calls

    def tainted_attempts(self) -> Mapping[tuple[str, ...], float]:
        """Return the number of attempts that received untrusted content."""
        return {(): self._tainted}


def _label_of(tool: RegisteredTool | None) -> str:
    return tool.name if tool is not None and tool.source.startswith("plugin:") else OTHER
