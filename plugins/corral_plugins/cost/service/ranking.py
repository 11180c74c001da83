"""Tasks by cost: the one breakdown with too many keys to be read whole."""

from __future__ import annotations

from typing import Any

import peewee

from corral.database.statement import Parameter, Statement
from corral_plugins.cost.models import Sum
from corral_plugins.cost.service.sums import SUMMED, TASK, Came, came

# The series is a literal: the partial index is only used for conditions that the planner can see.
_TASKS = peewee.SQL(f"series = '{TASK}'")


def _in_period(p: Parameter) -> peewee.Expression:
    return (Sum.series == TASK) & (Sum.period >= p("first")) & (Sum.period <= p("last"))


_TOP = Statement(
    lambda p: (
        Sum.select(Sum.key, peewee.fn.SUM(Sum.cost_micro))
        .where(_in_period(p))
        .group_by(Sum.key)
        .order_by(peewee.SQL("2 DESC"), Sum.key)
        .limit(p("limit"))
        .offset(p("offset"))
        .tuples()
    )
)
_COUNT = Statement(
    lambda p: (
        Sum.select(peewee.fn.COUNT(peewee.SQL("*")))
        .from_(Sum.select(Sum.key).where(_in_period(p)).group_by(Sum.key).alias("worked"))
        .tuples()
    )
)


def tasks(first: int, last: int, *, limit: int, offset: int) -> tuple[list[tuple[str, Came]], int]:
    """A part of the tasks that cost something in these days, the most expensive first, and how many there are.

    The order is found by the cost alone; the other figures are read for the part that is shown.
    """
    bounds = {"first": first, "last": last}
    ordered = [key for key, _ in _TOP.rows({**bounds, "limit": limit, "offset": offset})]
    shown = Sum.key.in_(ordered) & _TASKS & (Sum.period >= first) & (Sum.period <= last)
    found: Any = Sum.select(Sum.key, *SUMMED).where(shown).group_by(Sum.key).tuples() if ordered else ()
    figures = {task_id: came(values) for task_id, *values in found}
    count = _COUNT.one(bounds)
    return [(task_id, figures[task_id]) for task_id in ordered], int(count[0]) if count is not None else 0
