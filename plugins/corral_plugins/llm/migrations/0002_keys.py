"""The secret of the vault that holds a provider's key."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: Any) -> None:
    migrator.migrate(
        migrator.add_column("llm_providers", "api_key_secret", peewee.CharField(max_length=128, null=True))
    )
