"""The titles of all events that a notification counts."""

from __future__ import annotations

from typing import Any

from peewee import TextField


def up(migrator: Any, db: Any) -> None:
    migrator.migrate(migrator.add_column("notifications_notifications", "titles", TextField(default="[]")))
