"""Start, stop, pause, resume: each change is one guarded update of what was read."""

from __future__ import annotations

from typing import Any

from corral.auth.principal import Principal
from corral.errors import Conflict, Forbidden
from corral.http.answers import ANY_VERSION, IfMatch
from corral.plugin import Audit, AuditEntry
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.models import Agent
from corral_plugins.agents.service.changes import StateChanges, ending
from corral_plugins.agents.service.rows import TRIES, contended, has_leases, readable, same_state, swap, writable
from corral_plugins.agents.service.shapes import AgentView, StopAgent
from corral_plugins.agents.service.views import Views
from corral_plugins.tasks.api import Tasks


class AgentStates:
    """What people do to an agent's state. Joins the caller's unit; every method answers the agent as it is then."""

    tasks: Tasks | None
    kill_switch: KillSwitch | None
    audit: Audit | None

    def __init__(self, views: Views, changes: StateChanges) -> None:
        self._views, self._changes = views, changes

    def start(self, agent_id: str, match: IfMatch = ANY_VERSION, *, override: bool, by: Principal) -> AgentView:
        """Let it claim. `kill_switch`; `budget_exhausted` unless an admin overrides; `invalid_state` (open breaker)."""
        if override and not by.may("agents.manage"):
            raise Forbidden("override needs the permission agents.manage.")
        for _ in range(TRIES):
            row = self._row(agent_id, match, by)
            if row.status in ("idle", "busy"):
                return self._views.one(row)
            self._refuse_while_killed()
            overridden = row.status == "paused" and row.status_reason == "budget"
            if row.status == "paused":
                _refuse_held(row, override=override)
            if self._move(row, _claiming(row), failures_in_a_row=0):
                if overridden and self.audit is not None:
                    entry = AuditEntry(action="agents.agent.override", object_type="agent", object_id=agent_id)
                    self.audit.record(entry)
                return self._answer(agent_id, by)
        raise contended()

    def stop(self, agent_id: str, how: StopAgent, match: IfMatch = ANY_VERSION, *, by: Principal) -> AgentView:
        """`immediate`: offline now, leases are revoked here. `drain`: no new claims, offline after the last lease."""
        for _ in range(TRIES):
            row = self._row(agent_id, match, by)
            if row.status == "offline" or (how.mode == "drain" and row.status == "draining"):
                return self._views.one(row)
            if how.mode == "immediate":
                self._revoke(agent_id, how)
                row = self._row(agent_id, match, by)
                # Claimed while the others ended: those end as well. Or somebody else has stopped it.
                if has_leases(self.tasks, agent_id) or row.status == "offline":
                    continue
                after = "offline"
            else:
                after = "draining" if row.active_tasks else "offline"
            values: dict[str, Any] = {"active_tasks": 0} if after == "offline" else {}
            if self._move(row, after, told=how.reason, **values):
                return self._answer(agent_id, by)
        raise contended()

    def pause(self, agent_id: str, match: IfMatch = ANY_VERSION, *, reason: str | None, by: Principal) -> AgentView:
        """No new claims; leases that run go on. `invalid_state` for an agent that is not started."""
        for _ in range(TRIES):
            row = self._row(agent_id, match, by)
            if row.status == "paused" and row.status_reason == "manual":
                return self._views.one(row)
            if row.status not in ("idle", "busy", "paused"):
                raise _wrong_state(row, "paused; only a started one can be")
            if self._move(row, "paused", why="manual", told=reason):
                return self._answer(agent_id, by)
        raise contended()

    def resume(self, agent_id: str, match: IfMatch = ANY_VERSION, *, reason: str | None, by: Principal) -> AgentView:
        """End a pause. `kill_switch`, `budget_exhausted`, `invalid_state`."""
        for _ in range(TRIES):
            row = self._row(agent_id, match, by)
            if row.status in ("idle", "busy"):
                return self._views.one(row)
            if row.status != "paused":
                raise _wrong_state(row, "resumed; start it instead")
            self._refuse_while_killed()
            _refuse_held(row, override=False)
            if self._move(row, _claiming(row), told=reason):
                return self._answer(agent_id, by)
        raise contended()

    def _row(self, agent_id: str, match: IfMatch, by: Principal) -> Agent:
        row = writable(agent_id, by)
        match.check(row.version)
        return row

    def _refuse_while_killed(self) -> None:
        if self.kill_switch is not None:
            self.kill_switch.refuse_if_engaged()

    def _answer(self, agent_id: str, by: Principal) -> AgentView:
        return self._views.one(readable(agent_id, by))

    def _revoke(self, agent_id: str, how: StopAgent) -> None:
        """Tasks first, then the agent: the order in which everybody locks them."""
        if self.tasks is not None:
            with ending(agent_id):
                self.tasks.release_agent(agent_id, cancel=how.cancel_tasks, reason="agent_stopped")

    def _move(self, row: Agent, after: str, *, why: str | None = None, told: str | None = None, **values: Any) -> bool:
        """Set the state if row and leases are still those that were read. `why` is the new `status_reason`."""
        if not swap(row, {"status": after, "status_reason": why, **values}, same_state(row)):
            return False
        self._changes.tell(row.id, row.name, row.created_by, row.status, after, told or why)
        return True


def _claiming(row: Agent) -> str:
    return "busy" if row.active_tasks else "idle"


def _refuse_held(row: Agent, *, override: bool) -> None:
    """What paused it may not be over: the budget, or its only provider's breaker, which ends the pause by itself."""
    if row.status_reason == "budget" and not override:
        raise Conflict(
            "The agent's budget is used up; raise it, or let an admin start it with override.",
            code="budget_exhausted",
            current_status=row.status,
        )
    if row.status_reason == "circuit_open":
        raise Conflict(
            "The breaker of the agent's only provider is open; the agent goes on by itself when it closes.",
            current_status=row.status,
        )


def _wrong_state(row: Agent, what: str) -> Conflict:
    return Conflict(f"An agent that is {row.status} cannot be {what}.", current_status=row.status)
