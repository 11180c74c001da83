"""Loads the secrets of all channels into the redactor of this process, at start and after every change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Unavailable
from corral.events.log import LoggedEvent
from corral.redact.redactor import Redactor
from corral_plugins.notifications.api import NotificationChannelChanged
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.credentials import ChannelCredentials

SOURCE = "notifications"
BATCH_SIZE = 500
RETRY_SECONDS = 0.5
ENTRY = UnitContext(label="notifications.redactor_values", actor=SYSTEM)


class ChannelRedactorValues:
    """Keeps the redactor's copy of the credentials up to date."""

    def __init__(self, work: Work, redactor: Redactor, credentials: ChannelCredentials) -> None:
        self._work, self._redactor, self._credentials = work, redactor, credentials
        self._changed = asyncio.Event()
        self._opened: dict[tuple[str, int], dict[str, str]] = {}  # by id and version

    def on_events(self, events: Sequence[LoggedEvent]) -> None:
        """Wake up `run` if a channel changed. Called by the event feed."""
        if any(event.type == NotificationChannelChanged.event for event in events):
            self._changed.set()

    async def run(self) -> None:
        """Refresh the redactor after every change. Runs as a supervised task."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.refresh()
            except Unavailable:
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def refresh(self) -> None:
        """Read the channels that have changed, and pass the credentials of all to the redactor."""
        listed = await self._list()
        missing = [key for key in listed if key not in self._opened]
        for start in range(0, len(missing), BATCH_SIZE):
            ids = [channel_id for channel_id, _ in missing[start : start + BATCH_SIZE]]
            rows = await self._work(lambda ids=ids: _read(ids), entry=ENTRY, read=True)  # type: ignore[misc]  # bound now
            self._opened |= await asyncio.to_thread(self._open, rows)
        self._opened = {key: values for key, values in self._opened.items() if key in listed}
        values = {name: value for found in self._opened.values() for name, value in found.items()}
        await asyncio.to_thread(self._redactor.set_values, SOURCE, values)

    async def _list(self) -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        after = ""
        while True:
            some = await self._work(lambda after=after: _list_batch(after), entry=ENTRY, read=True)  # type: ignore[misc]  # bound now
            found.update(some)
            if len(some) < BATCH_SIZE:
                return found
            after = some[-1][0]

    def _open(self, rows: Sequence[Channel]) -> dict[tuple[str, int], dict[str, str]]:
        """Decrypt credentials.

        Those whose key is not loaded are left out, so that the next refresh tries them again: another process may have
        rewrapped them by then. Until then, this process cannot reveal them either.
        """
        opened: dict[tuple[str, int], dict[str, str]] = {}
        for row in rows:
            with contextlib.suppress(Unavailable):
                secrets = self._credentials.readable_secrets(row) or {}
                opened[row.id, row.version] = {f"{row.id}.{name}": text for name, text in secrets.items()}
        return opened


def _list_batch(after: str) -> list[tuple[str, int]]:
    rows = Channel.select(Channel.id, Channel.version).where(Channel.id > after).order_by(Channel.id)
    return [(row.id, row.version) for row in rows.limit(BATCH_SIZE)]


def _read(ids: Sequence[str]) -> list[Channel]:
    return list(Channel.select().where(Channel.id.in_(ids)))
