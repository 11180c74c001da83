"""Changes of state: how they are told and counted, and how a stop keeps its own from being told in pieces."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar

from corral.database.unit import after_commit
from corral.events.event import emit
from corral.plugin import Setting
from corral_plugins.agents.api import AgentStatus

ERROR_AFTER_FAILURES: Setting[int] = Setting(
    name="agents.error_after_failures",
    kind=int,
    default=3,
    minimum=1,
    maximum=20,
    title="Failures in a row that repeating cannot cure, until an agent stands in error",
)

STATUSES = ("offline", "idle", "busy", "draining", "paused", "error")

_ending: ContextVar[str | None] = ContextVar("agents_ending", default=None)


class StateChanges:
    """Counts committed changes by new state, and tells each of them. One a kernel."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def tell(self, agent_id: str, name: str, owner: str | None, before: str, after: str, reason: str | None) -> None:
        """Emit `agent.status` and count it with the commit; nothing when the state stayed."""
        if before == after:
            return
        event = AgentStatus(agent_id=agent_id, name=name, before=before, after=after, reason=reason)
        emit(event, object=("agent", agent_id), owner=owner)
        after_commit(lambda: self.counts.update((after,)))

    def by_state(self) -> dict[tuple[str, ...], float]:
        """For the metric."""
        return {(state,): float(self.counts[state]) for state in STATUSES}


@contextlib.contextmanager
def ending(agent_id: str) -> Iterator[None]:
    """Within, leases of this agent that end only free their slot: who ends them all sets the state once."""
    token = _ending.set(agent_id)
    try:
        yield
    finally:
        _ending.reset(token)


def is_ending(agent_id: str) -> bool:
    """Whether the caller is inside `ending` of this agent."""
    return _ending.get() == agent_id
