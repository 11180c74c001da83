"""Raises an alert for each plugin that fails in this process, whether during boot, when it starts, or later."""

from __future__ import annotations

import asyncio
import functools

from corral.database.engine import Work
from corral.database.migrations import MigrationFailed
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginRegistry


class FailureAlerts:
    """Raises alerts for failed plugins. All processes together raise at most one alert per plugin per hour."""

    def __init__(self, registry: PluginRegistry, work: Work) -> None:
        self._registry, self._work = registry, work
        self._reported: dict[str, str] = {}

    async def raise_for_failures(self) -> None:
        """Raise an alert for each new failure until cancelled. The kernel supervises this task in every process."""
        changed = asyncio.Event()

        def notify(record: PluginRecord) -> None:
            changed.set()

        self._registry.listeners.append(notify)
        try:
            while True:
                changed.clear()
                for record in self._registry.all():
                    if record.state == "failed" and self._reported.get(record.name) != record.since:
                        await self._work(functools.partial(_raise, record))
                        self._reported[record.name] = record.since
                await changed.wait()
        finally:
            self._registry.listeners.remove(notify)


def _raise(record: PluginRecord) -> None:
    is_migration = isinstance(record.error, MigrationFailed)
    alert = SystemAlert(
        kind="migration_failed" if is_migration else "plugin_failed",
        severity="critical",
        title=f"{'A migration of the' if is_migration else 'The'} plugin {record.name} failed",
        detail=record.reason or "",
        object={"type": "plugin", "id": record.name},
    )
    raise_alert(alert, ("plugin", record.name))
