"""Adds the column that marks reviews of patches from outside the installation."""

from __future__ import annotations

from typing import Any

from peewee import BooleanField


def up(migrator: Any, db: Any) -> None:
    migrator.migrate(migrator.add_column("code_reviews_reviews", "is_tainted", BooleanField(default=False)))
