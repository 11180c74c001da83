"""Keys of the gateway's calls and reported ones are apart: each is unique among its own."""

from __future__ import annotations

from typing import Any

import peewee


def up(migrator: Any, db: Any) -> None:
    migrator.migrate(
        migrator.add_column("cost_events", "by_gateway", peewee.BooleanField(default=False)),
        migrator.drop_index("cost_events", "cost_events_usage_key"),
        migrator.add_index("cost_events", ("usage_key", "by_gateway"), True),
    )
