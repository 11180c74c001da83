"""Loads the secrets of all channels into the redactor of this process, at start and after every change."""

from __future__ import annotations

import asyncio
import contextlib

from corral.crypto import SealedWrong
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Unavailable
from corral.redact.redactor import Redactor
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.credentials import ChannelCredentials

SOURCE = "notifications"
LOOK_SECONDS = 1.5  # in which another process notices a change
MAX_CHANNELS = 1000
ENTRY = UnitContext(label="notifications.redactor_values", actor=SYSTEM)


class ChannelRedactorValues:
    """Keeps the redactor's copy of the credentials up to date."""

    def __init__(self, work: Work, redactor: Redactor, credentials: ChannelCredentials) -> None:
        self._work, self._redactor, self._credentials = work, redactor, credentials
        self._changed = asyncio.Event()
        self._opened: dict[tuple[str, int], dict[str, str]] = {}  # by id and version

    def wake(self) -> None:
        """Refresh at once, because a channel changed."""
        self._changed.set()

    async def run(self) -> None:
        """Refresh the redactor after every change. Runs as a supervised task."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)
            self._changed.clear()
            with contextlib.suppress(Unavailable):
                await self.refresh()

    async def refresh(self) -> None:
        """Read the channels that have changed, and pass the credentials of all to the redactor."""
        listed = await self._work(_list, entry=ENTRY, read=True)
        if listed == self._opened.keys():
            return
        missing = [channel_id for channel_id, version in listed if (channel_id, version) not in self._opened]
        rows = await self._work(lambda: _read(missing), entry=ENTRY, read=True) if missing else []
        self._opened |= await asyncio.to_thread(self._open, rows)
        self._opened = {key: values for key, values in self._opened.items() if key in listed}
        values = {name: value for found in self._opened.values() for name, value in found.items()}
        await asyncio.to_thread(self._redactor.set_values, SOURCE, values)

    def _open(self, rows: list[Channel]) -> dict[tuple[str, int], dict[str, str]]:
        opened: dict[tuple[str, int], dict[str, str]] = {}
        for row in rows:
            opened[row.id, row.version] = {}
            with contextlib.suppress(Unavailable, SealedWrong):
                secrets = self._credentials.secrets(row)
                opened[row.id, row.version] = {f"{row.id}.{name}": text for name, text in secrets.items()}
        return opened


def _list() -> set[tuple[str, int]]:
    return {(row.id, row.version) for row in Channel.select(Channel.id, Channel.version).limit(MAX_CHANNELS)}


def _read(ids: list[str]) -> list[Channel]:
    return list(Channel.select().where(Channel.id.in_(ids)))
