"""Counts of this process since its start, for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from corral.database.unit import after_commit


class Seen:
    """Attempts that ended, leases that were taken back, runs that stalled. Counted once their unit is committed."""

    def __init__(self) -> None:
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._reclaims = 0
        self._stalls: Counter[tuple[str, ...]] = Counter()

    def attempt_ended(self, result: str, *, by: str) -> None:
        """A lease ended with this line in the ledger."""
        after_commit(lambda: self._count(result, by))

    def stalled(self, kind: str) -> None:
        """A run was found idle or in a loop."""
        after_commit(lambda: self._stalls.update([(kind,)]))

    def _count(self, result: str, by: str) -> None:
        self._attempts[(result,)] += 1
        self._reclaims += by == "reaper"

    def attempts(self) -> Mapping[tuple[str, ...], float]:
        """By result."""
        return self._attempts

    def reclaims(self) -> Mapping[tuple[str, ...], float]:
        """Leases that ended without their worker."""
        return {(): self._reclaims}

    def stalls(self) -> Mapping[tuple[str, ...], float]:
        """By kind."""
        return self._stalls
