"""Keeps every process in step with the stored values: it polls the version on each wake-up and once a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from corral import clock
from corral.database.engine import Work
from corral.events.feed import Feed
from corral.ids import new_id
from corral.settings.registry import SettingsRegistry, StoredSetting
from corral_plugins.settings.api import SettingChanged
from corral_plugins.settings.models import OutdatedRow
from corral_plugins.settings.service.store import SettingsService

log = logging.getLogger("corral.settings")

POLL_SECONDS = 1.0
RENEW_SECONDS, FORGET_SECONDS = 10.0, 30.0
PROPAGATION_SECONDS = 3.0
"""After this time every process has noticed a change."""


class LiveSettings:
    """Applies stored values as they change, and publishes which settings of this process need a restart."""

    def __init__(self, work: Work, feed: Feed, registry: SettingsRegistry, service: SettingsService) -> None:
        self._work, self._feed, self._registry, self._service = work, feed, registry, service
        self._process = new_id()
        self._published: tuple[list[str], float] = ([], 0.0)
        self._failing = self._leaving = False

    async def refresh(self) -> None:
        """Apply the stored values if they are newer than those in effect here."""
        found = await self._work(self._newer, read=True)
        if found is not None:
            self._service.apply(*found)
        await self._service.update_redactor()
        await self._publish_outdated()

    async def follow(self) -> None:
        """Run for ever. While the database does not answer, the known values stay in effect."""
        with self._feed.waiting([SettingChanged.event]) as rung:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await rung.wait()
                rung.clear()
                try:
                    await self.refresh()
                    self._failing = False
                except Exception:
                    if not self._failing:
                        log.exception("settings cannot be read; the known values stay in effect")
                    self._failing = True

    async def leave(self) -> None:
        """Withdraw the notice about outdated values, because this process ends."""
        self._leaving = True
        if self._published[0]:
            await self._work(lambda: OutdatedRow.delete().where(OutdatedRow.process == self._process).execute())

    def _newer(self) -> tuple[int, dict[str, StoredSetting]] | None:
        version = self._service.rows.version()
        return None if version <= self._registry.version else (version, self._service.rows.all())

    async def _publish_outdated(self) -> None:
        """Keep a row in the database only while some setting is outdated, and renew it regularly."""
        names = [item.setting.name for item in self._registry.all() if item.pending]
        told, at = self._published
        if self._leaving:
            return
        if names != told or (names and time.monotonic() - at > RENEW_SECONDS):
            await self._work(lambda: self._write(names))
            self._published = (names, time.monotonic())

    def _write(self, names: list[str]) -> None:
        mine = OutdatedRow.process == self._process
        OutdatedRow.delete().where(mine | (OutdatedRow.seen_at < clock.now(-FORGET_SECONDS))).execute()
        if names:  # two polls of this process may overlap, hence the upsert
            row = {"process": self._process, "names": names, "seen_at": clock.now()}
            OutdatedRow.insert(row).on_conflict(conflict_target=[OutdatedRow.process], update=row).execute()


def outdated_names() -> frozenset[str]:
    """Return the settings of which some process still uses an old value. Joins the caller's unit of work."""
    rows = OutdatedRow.select(OutdatedRow.names).where(OutdatedRow.seen_at >= clock.now(-FORGET_SECONDS)).limit(1000)
    return frozenset(name for row in rows for name in row.names)
