"""Finds the task that has waited longest although an agent has a free slot for it."""

from __future__ import annotations

from corral import clock
from corral.database.dialect import execute, json_array_strings
from corral_plugins.agents.api import Agents
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.statistics import RANKS

_OLDEST = (
    "SELECT queued_at, id FROM tasks_tasks WHERE status = 'pending' AND queue IS NOT NULL AND rank = ? AND priority = ?"
    " AND (agent_id IS NULL OR agent_id NOT IN (SELECT value FROM {agents}))"
    " AND COALESCE(agent_role, CASE WHEN agent_id IS NULL THEN '*' ELSE '' END) NOT IN (SELECT value FROM {roles})"
    " ORDER BY queued_at LIMIT 1"
)
ANY_ROLE = "*"


def longest_waiting(agents: Agents) -> tuple[str, int] | None:
    """Return the id and the waiting time in milliseconds of the pending task that has waited longest.

    Tasks whose agents are all busy are omitted, because they only wait for their turn. Return None if there is no other
    task in a queue.
    """
    started = agents.started_agents(None)
    busy = {each.id for each in started if each.active_tasks >= each.max_concurrent_tasks}
    free_roles = {role for each in started if each.id not in busy for role in (each.role, ANY_ROLE)}
    busy_roles = {role for each in started for role in (each.role, ANY_ROLE)} - free_roles
    sql = _OLDEST.format(agents=json_array_strings("a"), roles=json_array_strings("r"))
    omitted = [rows.to_json_text(sorted(busy)), rows.to_json_text(sorted(busy_roles))]
    found = [execute(sql, [*pair, *omitted]).fetchone() for pair in RANKS]
    oldest = min((row for row in found if row is not None), default=None)
    return None if oldest is None else (oldest[1], clock.elapsed_ms(oldest[0], clock.now()))
