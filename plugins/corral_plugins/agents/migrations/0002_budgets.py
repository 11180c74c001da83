"""Adds the monthly budget and the cost limit per task, in micro-USD."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Add the budget columns."""
    for name in ("monthly_budget_micro", "max_cost_per_task_micro"):
        migrator.migrate(migrator.add_column("agents_agents", name, peewee.BigIntegerField(null=True)))
