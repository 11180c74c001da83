"""State changes of agents (start, stop, pause and resume), with their events and metrics.

Each change is a single conditional UPDATE, which has no effect if the row has changed since it was read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import peewee

from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.database.unit import after_commit
from corral.errors import Conflict, Forbidden
from corral.events.event import emit
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import Audit, AuditEntry, Setting
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentStatusChanged
from corral_plugins.agents.models import LIVING, Agent
from corral_plugins.agents.service.rows import (
    TRIES,
    AgentViews,
    contention_error,
    find_readable_agent,
    find_writable_agent,
    has_leases,
    is_state_unchanged,
    update_if_unchanged,
)
from corral_plugins.agents.shapes import AgentView, StopAgent
from corral_plugins.cost.api import Costs
from corral_plugins.tasks.api import Tasks

ERROR_AFTER_FAILURES: Setting[int] = Setting(
    name="agents.error_after_failures",
    kind=int,
    default=3,
    minimum=1,
    maximum=20,
    title="Number of consecutive configuration failures after which an agent enters the state `error`",
)
PAUSE_AFTER_STALLS: Setting[int] = Setting(
    name="agents.pause_after_stalls",
    kind=int,
    default=3,
    minimum=0,
    maximum=20,
    title="Number of consecutive stalled tasks after which an agent is paused (0: never)",
)

STATUSES = ("offline", "idle", "busy", "draining", "paused", "error")

_ending: ContextVar[str | None] = ContextVar("agents_ending", default=None)


class StateChangePublisher:
    """Publishes the state changes of agents and counts them. There is one instance per kernel."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def publish_change(
        self,
        agent_id: str,
        name: str,
        owner: str | None,
        before: str,
        after: str,
        reason: str | None,
        cause: tuple[str, ...] = (),
    ) -> None:
        """Emit `agent.status`, and count the change after the commit. Does nothing if the state stays the same."""
        if before == after:
            return
        event = AgentStatusChanged(agent_id=agent_id, name=name, before=before, after=after, reason=reason)
        emit(event, object=("agent", agent_id), owner=owner, cause=cause or None)
        after_commit(lambda: self.counts.update((after,)))

    def count_by_state(self) -> dict[tuple[str, ...], float]:
        """Return the number of committed state changes, keyed by new state. The result is the value of a metric."""
        return {(state,): float(self.counts[state]) for state in STATUSES}


@contextlib.contextmanager
def suppress_state_changes(agent_id: str) -> Iterator[None]:
    """Suppress state changes of an agent while the `with` block ends several of its leases.

    Inside the block, ending a lease only releases its slot. The caller sets the agent's state once, after the block.
    """
    token = _ending.set(agent_id)
    try:
        yield
    finally:
        _ending.reset(token)


def are_state_changes_suppressed(agent_id: str) -> bool:
    """Return whether a `suppress_state_changes` block is active for this agent.

    If so, ending a single lease must not change the agent's state.
    """
    return _ending.get() == agent_id


_BY_STATUS = Statement(
    lambda p: Agent.select(Agent.status, peewee.fn.COUNT(Agent.id)).where(LIVING).group_by(Agent.status).tuples()
)


def count_by_status() -> dict[tuple[str, ...], float]:
    """Return the number of agents, keyed by state. The result is the value of a metric.

    Runs in the caller's unit of work.
    """
    counts = dict.fromkeys(STATUSES, 0.0)
    counts.update((status, float(count)) for status, count in _BY_STATUS.rows({}))
    return {(status,): count for status, count in counts.items()}


class AgentStates:
    """Actions that change the state of an agent. Every method runs in the caller's unit of work.

    Each method returns the agent in its new state.
    """

    cost: Costs | None
    tasks: Tasks | None
    kill_switch: KillSwitch | None
    audit: Audit | None

    def __init__(self, views: AgentViews, changes: StateChangePublisher) -> None:
        self._views, self._changes = views, changes

    def start(self, agent_id: str, match: IfMatch = ANY_VERSION, *, override: bool, by: Principal) -> AgentView:
        """Start an agent, so that it claims tasks.

        Raise a `Problem` with the code `kill_switch` while the kill switch is engaged. If the agent was paused because
        its budget is used up, raise `Conflict` with the code `budget_exhausted`, unless `override` is set. If it was
        paused because its provider's circuit breaker is open, raise `Conflict` with the code `invalid_state`.
        """
        if override and not by.may("agents.manage"):
            raise Forbidden("Starting an agent with `override` requires the permission agents.manage.")
        for _ in range(TRIES):
            row = self._writable_row(agent_id, match, by)
            if row.status in ("idle", "busy"):
                return self._views.view_of(row)
            self._refuse_while_killed()
            overridden = row.status == "paused" and row.status_reason == "budget"
            if row.status == "paused":
                _refuse_automatic_pause(row, override=override)
            if self._transition(row, _state_for_claims(row), failures_in_a_row=0, stalls_in_a_row=0):
                if overridden and self.cost is not None:
                    self.cost.lift_agent_limit(agent_id)
                if overridden and self.audit is not None:
                    entry = AuditEntry(action="agents.agent.override", object_type="agent", object_id=agent_id)
                    self.audit.record(entry)
                return self._current_view(agent_id, by)
        raise contention_error()

    def stop(self, agent_id: str, how: StopAgent, match: IfMatch = ANY_VERSION, *, by: Principal) -> AgentView:
        """Stop an agent.

        The mode `immediate` revokes the agent's leases. The mode `drain` lets the agent finish its current tasks, and
        stops it when its last lease ends.
        """
        for _ in range(TRIES):
            row = self._writable_row(agent_id, match, by)
            if row.status == "offline" or (how.mode == "drain" and row.status == "draining"):
                return self._views.view_of(row)
            if how.mode == "immediate":
                self._revoke_leases(agent_id, how)
                row = self._writable_row(agent_id, match, by)
                # Retry: the agent claimed tasks meanwhile, whose leases must end too, or another request stopped it.
                if has_leases(self.tasks, agent_id) or row.status == "offline":
                    continue
                after = "offline"
            else:
                after = "draining" if row.active_tasks else "offline"
            values: dict[str, Any] = {"active_tasks": 0} if after == "offline" else {}
            if self._transition(row, after, reason=how.reason, **values):
                return self._current_view(agent_id, by)
        raise contention_error()

    def pause(self, agent_id: str, match: IfMatch = ANY_VERSION, *, reason: str | None, by: Principal) -> AgentView:
        """Pause a started agent. The agent claims no further tasks, but its leases remain valid.

        Raise `Conflict` if the agent is not started.
        """
        for _ in range(TRIES):
            row = self._writable_row(agent_id, match, by)
            if row.status == "paused" and row.status_reason == "manual":
                return self._views.view_of(row)
            if row.status not in ("idle", "busy", "paused"):
                raise _wrong_state(row, "paused; start the agent first")
            if self._transition(row, "paused", status_reason="manual", reason=reason):
                return self._current_view(agent_id, by)
        raise contention_error()

    def resume(self, agent_id: str, match: IfMatch = ANY_VERSION, *, reason: str | None, by: Principal) -> AgentView:
        """Resume a paused agent. Raises the same errors as `start`."""
        for _ in range(TRIES):
            row = self._writable_row(agent_id, match, by)
            if row.status in ("idle", "busy"):
                return self._views.view_of(row)
            if row.status != "paused":
                raise _wrong_state(row, "resumed; start it instead")
            self._refuse_while_killed()
            _refuse_automatic_pause(row, override=False)
            if self._transition(row, _state_for_claims(row), reason=reason, stalls_in_a_row=0):
                return self._current_view(agent_id, by)
        raise contention_error()

    def _writable_row(self, agent_id: str, match: IfMatch, by: Principal) -> Agent:
        row = find_writable_agent(agent_id, by)
        match.check(row.version)
        return row

    def _refuse_while_killed(self) -> None:
        if self.kill_switch is not None:
            self.kill_switch.refuse_if_engaged()

    def _current_view(self, agent_id: str, by: Principal) -> AgentView:
        return self._views.view_of(find_readable_agent(agent_id, by))

    def _revoke_leases(self, agent_id: str, how: StopAgent) -> None:
        """Revoke all leases of the agent.

        Call this method before locking the agent: to avoid deadlocks, every unit of work locks tasks before agents.
        """
        if self.tasks is not None:
            with suppress_state_changes(agent_id):
                self.tasks.release_leases_of_agent(agent_id, cancel=how.cancel_tasks, reason="agent_stopped")

    def _transition(
        self, row: Agent, after: str, *, status_reason: str | None = None, reason: str | None = None, **values: Any
    ) -> bool:
        """Change the state of the agent, unless its row or its leases have changed since `row` was read.

        Return whether the state was changed. The `agent.status` event contains `reason`.
        """
        if not update_if_unchanged(
            row, {"status": after, "status_reason": status_reason, **values}, is_state_unchanged(row)
        ):
            return False
        self._changes.publish_change(row.id, row.name, row.created_by, row.status, after, reason or status_reason)
        return True


def _state_for_claims(row: Agent) -> str:
    return "busy" if row.active_tasks else "idle"


def _refuse_automatic_pause(row: Agent, *, override: bool) -> None:
    """Raise `Conflict` if the agent was paused because its budget is used up or because a circuit breaker is open.

    If `override` is set, a used-up budget is ignored.
    """
    if row.status_reason == "budget" and not override:
        raise Conflict(
            "The agent's budget is used up; raise it, or ask an admin to start the agent with `override`.",
            code="budget_exhausted",
            current_status=row.status,
        )
    if row.status_reason == "circuit_open":
        raise Conflict(
            "The circuit breaker of the agent's only provider is open; the agent resumes automatically when the "
            "circuit breaker closes.",
            current_status=row.status,
        )


def _wrong_state(row: Agent, allowed: str) -> Conflict:
    return Conflict(f"An agent that is {row.status} cannot be {allowed}.", current_status=row.status)
