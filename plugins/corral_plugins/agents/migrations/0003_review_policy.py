"""Adds the review policy of agents."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: peewee.Database) -> None:
    """Add the column for the review policy."""
    db.execute_sql('ALTER TABLE "agents_agents" ADD COLUMN "review_policy" TEXT')
