"""What became of the money: tasks that were completed, attempts that failed, agents that are gone.

Read from the event log, so that `cost` need not be there when it happens nor be told by anybody.
"""

from __future__ import annotations

from typing import Any

from peewee import fn

from corral.events.log import Record
from corral_plugins.cost.models import CostEvent, DeletedAgent
from corral_plugins.cost.service import sums
from corral_plugins.cost.service.days import day_of
from corral_plugins.cost.service.sums import AGENT, ALL_TIME, TASK_TOTAL, TOTAL, Place

FOLLOWED = ("task.completed", "task.failed", "task.cancelled", "task.retried", "agent.deleted")


def note(event: Record) -> None:
    """Take one event of `FOLLOWED` into the sums."""
    told = event.payload()
    if event.type == "agent.deleted":
        row = {"agent_id": told["agent_id"], "name": told["name"][:200]}
        DeletedAgent.insert(**row).on_conflict_ignore().execute()
    elif event.type == "task.completed":
        _count(event, told, {"completed": 1})
    elif event.type != "task.retried" or told["source"] == "policy":  # a person repeats what has failed before
        _waste(event, told)


def _waste(event: Record, told: dict[str, Any]) -> None:
    """What the task had cost by then, and since its failure before, brought nothing."""
    task_id = told["task_id"]
    whole = sums.at_key(TASK_TOTAL, task_id)  # of the events the old ones may have been deleted
    later = CostEvent.select(fn.SUM(CostEvent.cost_micro)).where(CostEvent.task_id == task_id, CostEvent.ts > event.ts)
    wasted = whole.cost_micro - int(later.scalar() or 0) - whole.wasted_micro
    if wasted:
        _count(event, told, {"wasted_micro": wasted}, Place(TASK_TOTAL, ALL_TIME, task_id))


def _count(event: Record, told: dict[str, Any], figures: dict[str, int], *more: Place) -> None:
    """Written at once: the next event of the same unit builds on it."""
    places = (Place(AGENT, day_of(event.ts), told["agent_id"] or ""), Place(TOTAL, ALL_TIME, ""), *more)
    sums.write(dict.fromkeys(places, figures))
