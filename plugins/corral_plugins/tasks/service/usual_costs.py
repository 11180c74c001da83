"""The usual cost of an agent's attempts.

Claims reserve this amount for an attempt that has no cost limit of its own.
"""

from __future__ import annotations

import functools
import math
import time

from corral.database.statement import Statement
from corral.database.unit import after_commit
from corral_plugins.tasks.models import Attempt

RECENT_ATTEMPTS, PERCENTILE = 20, 0.9
CACHED_SECONDS = 2.0
CACHED_AGENTS = 10_000
_RECENT_COSTS = Statement(
    lambda p: (
        Attempt.select(Attempt.cost_micro)
        .where((Attempt.agent_id == p("agent")) & Attempt.finished_at.is_null(False))
        .order_by(Attempt.created_at.desc())
        .limit(RECENT_ATTEMPTS)
        .tuples()
    )
)


class UsualCosts:
    """Caches the usual cost of each agent.

    Attempts that end in other processes are included after at most 2 seconds.
    """

    def __init__(self) -> None:
        self._cached: dict[str, tuple[int | None, float]] = {}

    def of_agent(self, agent_id: str) -> int | None:
        """Return the 90th percentile of the costs of the agent's last 20 attempts, in micro-USD.

        Return None if the agent has no attempts. The method runs in the caller's unit of work.
        """
        cached = self._cached.get(agent_id)
        if cached is not None and cached[1] > time.monotonic():
            return cached[0]
        recent = sorted(micro for (micro,) in _RECENT_COSTS.rows({"agent": agent_id}))
        usual = recent[math.ceil(PERCENTILE * len(recent)) - 1] if recent else None
        if len(self._cached) > CACHED_AGENTS:
            self._cached.clear()
        self._cached[agent_id] = (usual, time.monotonic() + CACHED_SECONDS)
        return usual

    def invalidate(self, agent_id: str) -> None:
        """After the commit, discard the cached cost of an agent. Called when one of the agent's attempts ends."""
        after_commit(functools.partial(self._drop, agent_id))

    def _drop(self, agent_id: str) -> None:
        self._cached.pop(agent_id, None)
