"""Adds the column with the titles of all events in a notification."""

from __future__ import annotations

from typing import Any

from peewee import TextField


def up(migrator: Any, db: Any) -> None:
    migrator.migrate(migrator.add_column("notifications_notifications", "titles", TextField(default="[]")))
