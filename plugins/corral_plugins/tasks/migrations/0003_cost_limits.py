"""Add the cost limits of attempts, in micro-USD."""

from __future__ import annotations

from typing import Any

from peewee import BigIntegerField


def up(migrator: Any, db: Any) -> None:
    """Add the columns."""
    for name in ("cost_limit_micro", "cost_warning_micro"):
        migrator.migrate(migrator.add_column("tasks_attempts", name, BigIntegerField(null=True)))
