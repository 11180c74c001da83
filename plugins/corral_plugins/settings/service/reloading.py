"""Keeps a process's settings up to date: checks the stored version after each notification and once a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from corral import clock
from corral.database.engine import Database
from corral.database.unit import SYSTEM_CONTEXT
from corral.events.live_feed import Feed
from corral.ids import new_id
from corral_plugins.settings.api import SettingChanged
from corral_plugins.settings.models import OutdatedProcessRow
from corral_plugins.settings.service.effective import EffectiveSettings, StoredSetting
from corral_plugins.settings.service.store import SettingsService

log = logging.getLogger("corral.settings")

POLL_SECONDS = 1.0
RENEW_SECONDS, FORGET_SECONDS = 10.0, 30.0
PROPAGATION_SECONDS = 3.0
"""The maximum time, in seconds, until every process has applied a change."""


class LiveSettings:
    """Applies stored values when they change, and records which settings stay outdated until this process restarts."""

    def __init__(self, database: Database, feed: Feed, effective: EffectiveSettings, service: SettingsService) -> None:
        self._database, self._work, self._feed, self._effective, self._service = (
            database,
            database.work,
            feed,
            effective,
            service,
        )
        self._process = new_id()
        self._published: tuple[list[str], float] = ([], 0.0)
        self._failing = self._leaving = False

    async def apply_newer_values(self) -> None:
        """Apply the stored values if they are newer than the values in effect in this process."""
        found = await self._database.read(self._newer_values, SYSTEM_CONTEXT)
        if found is not None:
            self._service.apply_values(*found)
        await self._service.update_redactor()
        await self._publish_outdated()

    async def poll_changes(self) -> None:
        """Poll and apply changes until cancelled.

        While the database does not respond, the values that were last read stay in effect.
        """
        with self._feed.subscribe([SettingChanged.event]) as rung:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await rung.wait()
                rung.clear()
                try:
                    await self.apply_newer_values()
                    self._failing = False
                except Exception:
                    if not self._failing:
                        log.exception("settings cannot be read; the known values stay in effect")
                    self._failing = True

    async def delete_outdated_record(self) -> None:
        """Delete this process's row of outdated settings, because the process is stopping."""
        self._leaving = True
        if self._published[0]:
            await self._work(
                lambda: OutdatedProcessRow.delete().where(OutdatedProcessRow.process == self._process).execute()
            )

    def _newer_values(self) -> tuple[int, dict[str, StoredSetting]] | None:
        version = self._service.rows.stored_version()
        return None if version <= self._effective.version else (version, self._service.rows.all_rows())

    async def _publish_outdated(self) -> None:
        """Store the names of the settings that are outdated in this process.

        The row exists only while at least one setting is outdated, and is renewed regularly.
        """
        names = [item.setting.name for item in self._effective.current if item.pending]
        told, at = self._published
        if self._leaving:
            return
        if names != told or (names and time.monotonic() - at > RENEW_SECONDS):
            await self._work(lambda: self._write_outdated(names))
            self._published = (names, time.monotonic())

    def _write_outdated(self, names: list[str]) -> None:
        mine = OutdatedProcessRow.process == self._process
        OutdatedProcessRow.delete().where(mine | (OutdatedProcessRow.seen_at < clock.now(-FORGET_SECONDS))).execute()
        if names:  # two polls of this process may overlap, hence the upsert
            row = {"process": self._process, "names": names, "seen_at": clock.now()}
            OutdatedProcessRow.insert(row).on_conflict(
                conflict_target=[OutdatedProcessRow.process], update=row
            ).execute()


def outdated_names() -> frozenset[str]:
    """Return the names of the settings for which at least one process still uses an old value.

    Runs in the caller's unit of work.
    """
    rows = (
        OutdatedProcessRow.select(OutdatedProcessRow.names)
        .where(OutdatedProcessRow.seen_at >= clock.now(-FORGET_SECONDS))
        .limit(1000)
    )
    return frozenset(name for row in rows for name in row.names)
