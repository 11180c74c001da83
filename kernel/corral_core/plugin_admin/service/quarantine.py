"""Quarantine of plugins. Quarantines are stored in the database and applied by every process.

A quarantined plugin gets a trial after 60 s. An error during the trial quarantines the plugin again, for twice as long
as before, but at most for an hour. If no error occurs for `QUARANTINE_WINDOW_SECONDS`, the trial succeeds and the row
is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import peewee

from corral import clock
from corral.database.engine import Work
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert, emit
from corral.events.log import LoggedEvent
from corral.plugin import Audit, AuditEntry, Settings
from corral.plugins.quarantine import PluginAlert, PluginQuarantine
from corral.plugins.record import PluginRecord
from corral.plugins.registry import PluginRegistry
from corral.settings.kernel import QUARANTINE_WINDOW_SECONDS
from corral_core.plugin_admin.api import PluginStateChanged
from corral_core.plugin_admin.models import QuarantineRow

FIRST_PROBE, LAST_PROBE, LOOK_SECONDS = 60, 3600, 1.0
HELD, PROBATION = "held", "probation"


class QuarantineSync:
    """Stores the quarantines that this process imposes, and applies the stored quarantines of all processes."""

    audit: Audit | None = None

    def __init__(self, registry: PluginRegistry, quarantines: PluginQuarantine, work: Work, settings: Settings) -> None:
        self._registry, self._quarantines, self._work, self._settings = registry, quarantines, work, settings
        self._rows: dict[str, QuarantineRow] = {}
        self._stale = True
        self._bell: asyncio.Event | None = None

    async def synchronize_regularly(self) -> None:
        """Until cancelled, store new quarantines and alerts, apply stored quarantines, and start and end trials.

        The kernel supervises this task in every process.
        """
        loop, bell = asyncio.get_running_loop(), asyncio.Event()
        self._bell, self._stale = bell, True  # after a failure, the rows may not have been read

        def notify() -> None:
            loop.call_soon_threadsafe(bell.set)

        self._quarantines.notify = notify
        while True:
            while self._quarantines.alerts:
                alert = self._quarantines.alerts[0]
                await self._work(lambda alert=alert: self._store_alert(alert))  # type: ignore[misc]  # bound in each iteration
                self._quarantines.alerts.popleft()
                if (record := self._registry.get(alert.name)) is not None:
                    self._registry.publish(record)
            if self._stale:
                self._stale = False
                self.apply_rows(await self._work(self.stored_rows, read=True))
            await self._start_and_end_trials()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await bell.wait()
            bell.clear()

    def on_events(self, records: Sequence[LoggedEvent]) -> None:
        """Request another read of the stored quarantines if the state of a plugin changed in any process.

        The event feed calls this method.
        """
        if any(record.type == PluginStateChanged.event for record in records):
            self._stale = True
            if self._bell is not None:
                self._bell.set()

    def stored_rows(self) -> dict[str, QuarantineRow]:
        """Return the rows of all quarantines and trials, keyed by plugin name."""
        return {row.name: row for row in QuarantineRow.select()}

    def apply_rows(self, rows: dict[str, QuarantineRow]) -> None:
        """Quarantine and release plugins in this process to match the stored rows. Runs on the event loop."""
        self._rows = rows
        for loaded in self._registry.all():
            if not loaded.in_service or any(alert.name == loaded.name for alert in self._quarantines.alerts):
                continue
            row = rows.get(loaded.name)
            held = row is not None and row.state == HELD
            if row is not None and held and loaded.active and not loaded.protected:
                self._registry.change_state(loaded.name, "quarantined", row.reason)
            elif not held and loaded.state == "quarantined":
                self._quarantines.tracker(loaded.name).failures.clear()
                self._registry.change_state(loaded.name, "active")
            self._quarantines.tracker(loaded.name).on_probation = row is not None and not held

    def _store_alert(self, alert: PluginAlert) -> None:
        if alert.quarantined:
            row = {"state": HELD, "reason": alert.reason, "since": clock.now()}
            new = QuarantineRow.insert(name=alert.name, **row).on_conflict_ignore().as_rowcount().execute()
            mine = (QuarantineRow.name == alert.name) & (QuarantineRow.state == PROBATION)
            if not new and not QuarantineRow.update(**row).where(mine).execute():
                return  # another process stored this quarantine first
            self._publish_state(alert.name, "active", "quarantined", alert.reason)
            if self.audit is not None:
                entry = AuditEntry(
                    action="plugins.plugin.quarantine",
                    object_type="plugin",
                    object_id=alert.name,
                    details={"reason": alert.reason},
                )
                self.audit.record(entry)
        system_alert = SystemAlert(
            kind="plugin_quarantined" if alert.quarantined else "plugin_errors",
            severity="warning" if alert.quarantined else "critical",
            title=f"The plugin {alert.name} {'is in quarantine' if alert.quarantined else 'fails but is protected'}",
            detail=alert.reason,
            object={"type": "plugin", "id": alert.name},
        )
        raise_alert(system_alert, ("plugin", alert.name))

    async def _start_and_end_trials(self) -> None:
        """Start trials for plugins whose quarantine has ended, and end trials that completed without an error."""
        now = clock.time_s()
        window = self._settings.get(QUARANTINE_WINDOW_SECONDS)
        for row in list(self._rows.values()):
            wait = min(LAST_PROBE, FIRST_PROBE * 2**row.probes) if row.state == HELD else window
            if now >= clock.parse_instant(row.since) + wait:
                await self._work(lambda row=row: self._start_trial(row) if row.state == HELD else self._delete_row(row))  # type: ignore[misc]  # bound in each iteration
                self.apply_rows(await self._work(self.stored_rows, read=True))

    def _start_trial(self, row: QuarantineRow) -> None:
        tried = {"state": PROBATION, "since": clock.now(), "probes": row.probes + 1}
        if QuarantineRow.update(**tried).where(self._is_unchanged(row)).execute():
            self._publish_state(row.name, "quarantined", "active", "probe")

    def _delete_row(self, row: QuarantineRow) -> None:
        if QuarantineRow.delete().where(self._is_unchanged(row)).execute():
            self._publish_state(row.name, "active", "active", "no more errors")

    @staticmethod
    def _is_unchanged(row: QuarantineRow) -> peewee.Expression:
        same: peewee.Expression = (QuarantineRow.name == row.name) & (QuarantineRow.state == row.state)
        return same & (QuarantineRow.since == row.since)  # type: ignore[no-any-return]  # fields of peewee are untyped

    @staticmethod
    def _publish_state(name: str, before: str, after: str, reason: str) -> None:
        emit(PluginStateChanged(name=name, from_=before, to=after, reason=reason), object=("plugin", name))


def release_plugin(loaded: PluginRecord) -> bool:
    """End the quarantine or the trial of a plugin. Return whether there was one. Runs in the caller's unit of work."""
    return bool(QuarantineRow.delete().where(QuarantineRow.name == loaded.name).execute())
