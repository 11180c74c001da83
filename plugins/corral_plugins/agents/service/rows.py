"""Reads rows of agents for a caller, and changes a row only if it is unchanged since it was read."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import NotFound, Unavailable
from corral.ids import new_id
from corral_plugins.agents.models import LIVING, Agent, Version
from corral_plugins.agents.service.configuration import configuration
from corral_plugins.tasks.api import Tasks

TRIES = 5
"""The number of attempts to change a row that other units of work change at the same time."""


def readable(agent_id: str, caller: Principal) -> Agent:
    """Return the agent if it is not deleted and the caller may read it. Raises `NotFound`."""
    row: Agent | None = Agent.get_or_none((Agent.id == agent_id) & LIVING & visible(Agent, caller))
    if row is None:
        raise NotFound("There is no agent with this id.")
    return row


def exists(agent_id: str, caller: Principal) -> None:
    """Raise `NotFound` unless `readable` would find the agent. Unlike `readable`, this function reads only the id."""
    if not Agent.select(Agent.id).where((Agent.id == agent_id) & LIVING & visible(Agent, caller)).exists():
        raise NotFound("There is no agent with this id.")


def writable(agent_id: str, caller: Principal) -> Agent:
    """Return the agent if the caller owns it or is an admin. Raises `NotFound` or `Forbidden`."""
    row = readable(agent_id, caller)
    require_owner(caller, row.created_by, what="agent", manage="agents.manage")
    return row


def swap(row: Agent, values: dict[str, Any], *guards: Any) -> bool:
    """Write `values` and increment the version if the row is unchanged since it was read and every guard holds.

    Return whether the row was written.
    """
    unchanged: Any = (Agent.id == row.id) & LIVING & (Agent.version == row.version)
    for guard in guards:
        unchanged &= guard
    changes = {**values, "version": row.version + 1, "updated_at": clock.now()}
    return bool(Agent.update(changes).where(unchanged).execute())


def same_state(row: Agent) -> Any:
    """Return the guard condition of a transition: state and number of leases are unchanged since the row was read."""
    reason = Agent.status_reason.is_null() if row.status_reason is None else Agent.status_reason == row.status_reason
    return (Agent.status == row.status) & (Agent.active_tasks == row.active_tasks) & reason


def has_leases(tasks: Tasks | None, agent_id: str) -> bool:
    """Return whether the agent holds a live lease.

    Call this function after reading the row: `same_state` then detects leases that begin later.
    """
    return tasks is not None and bool(tasks.live_tasks([agent_id]).get(agent_id))


def contended() -> Unavailable:
    """Return the error for a row that another unit of work changed at every attempt."""
    return Unavailable(
        "The agent was changed by other requests at the same time; repeat the request.", code="overloaded"
    )


def add_version(row: Agent, changed: list[str], by: Principal) -> None:
    """Store the configuration of the row as the version `config_version`."""
    Version.insert(
        id=new_id(),
        agent_id=row.id,
        n=row.config_version,
        configuration=configuration(row),
        changed_fields=changed,
        created_by=by.user_id,
        created_at=clock.now(),
    ).execute()
