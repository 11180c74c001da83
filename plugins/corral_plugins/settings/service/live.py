"""Every process rules by what is stored: it looks at the version when the event rings, and each second anyway."""

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

LOOK_EVERY = 1.0
TELL_EVERY, FORGET_AFTER = 10.0, 30.0
UNHEARD = 3.0
"""Seconds after a change in which some process may not have heard of it yet."""


class LiveSettings:
    """Follows the stored values, and tells while this process goes on with older ones."""

    def __init__(self, work: Work, feed: Feed, registry: SettingsRegistry, service: SettingsService) -> None:
        self._work, self._feed, self._registry, self._service = work, feed, registry, service
        self._process = new_id()
        self._told: tuple[list[str], float] = ([], 0.0)
        self._failing = self._leaving = False

    async def refresh(self) -> None:
        """Read what is stored, if it is newer than what rules here."""
        found = await self._work(self._newer, read=True)
        if found is not None:
            self._service.rule(*found)
        await self._service.tell_redactor()
        await self._tell_if_outdated()

    async def follow(self) -> None:
        """For ever; a database that does not answer leaves what rules."""
        with self._feed.waiting([SettingChanged.event]) as rung:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY):
                        await rung.wait()
                rung.clear()
                try:
                    await self.refresh()
                    self._failing = False
                except Exception:
                    if not self._failing:
                        log.exception("settings cannot be read; those known so far rule")
                    self._failing = True

    async def leave(self) -> None:
        """This process ends, and its older values with it."""
        self._leaving = True
        if self._told[0]:
            await self._work(lambda: OutdatedRow.delete().where(OutdatedRow.process == self._process).execute())

    def _newer(self) -> tuple[int, dict[str, StoredSetting]] | None:
        version = self._service.rows.version()
        return None if version <= self._registry.version else (version, self._service.rows.all())

    async def _tell_if_outdated(self) -> None:
        """Only while there is something to tell is there a row, renewed now and then."""
        names = [item.setting.name for item in self._registry.all() if item.pending]
        told, at = self._told
        if self._leaving:
            return
        if names != told or (names and time.monotonic() - at > TELL_EVERY):
            await self._work(lambda: self._write(names))
            self._told = (names, time.monotonic())

    def _write(self, names: list[str]) -> None:
        mine = OutdatedRow.process == self._process
        OutdatedRow.delete().where(mine | (OutdatedRow.seen_at < clock.now(-FORGET_AFTER))).execute()
        if names:
            row = {"names": names, "seen_at": clock.now()}
            insert = OutdatedRow.insert(process=self._process, **row)
            insert.on_conflict(conflict_target=[OutdatedRow.process], update=row).execute()  # two may tell at once


def outdated() -> frozenset[str]:
    """The settings of which some process still has an older value. Joins the unit."""
    rows = OutdatedRow.select(OutdatedRow.names).where(OutdatedRow.seen_at >= clock.now(-FORGET_AFTER)).limit(1000)
    return frozenset(name for row in rows for name in row.names)
