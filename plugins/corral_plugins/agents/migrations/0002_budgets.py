"""Add the monthly budget and the cost limit per task, in micro-USD."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Add the columns."""
    for column in ("monthly_budget_micro", "max_cost_per_task_micro"):
        db.execute_sql(f'ALTER TABLE "agents_agents" ADD COLUMN "{column}" BIGINT')
