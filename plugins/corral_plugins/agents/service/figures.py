"""Figures over all agents, read at scrape time."""

from __future__ import annotations

import peewee

from corral.database.statement import Statement
from corral_plugins.agents.models import LIVING, Agent
from corral_plugins.agents.service.changes import STATUSES

_BY_STATUS = Statement(
    lambda p: Agent.select(Agent.status, peewee.fn.COUNT(Agent.id)).where(LIVING).group_by(Agent.status).tuples()
)


def count_by_status() -> dict[tuple[str, ...], float]:
    """Living agents by state, zero-filled; joins the unit."""
    counts = dict.fromkeys(STATUSES, 0.0)
    counts.update((status, float(count)) for status, count in _BY_STATUS.rows({}))
    return {(status,): count for status, count in counts.items()}
