"""Add the cost limits of attempts, in micro-USD."""

from __future__ import annotations

from typing import Any


def up(migrator: Any, db: Any) -> None:
    """Add the columns."""
    for column in ("cost_limit_micro", "cost_warning_micro"):
        db.execute_sql(f'ALTER TABLE "tasks_attempts" ADD COLUMN "{column}" BIGINT')
