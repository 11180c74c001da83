"""When and from where a key was last used: kept in memory and written together, at most once a minute for each key."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.database.unit import Entry
from corral_plugins.security.models import ApiKeyRow

log = logging.getLogger("corral.security")

EVERY_SECONDS = 60.0
WRITE_EVERY = 5.0
AT_ONCE = 200


class KeyUses:
    """Lives on the loop."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._noted: dict[str, float] = {}
        self._new: dict[str, tuple[str, str]] = {}

    def note(self, key_id: str, client_ip: str) -> None:
        """The key is being used; most calls find that it was within the last minute."""
        now = clock.time_s()
        if now - self._noted.get(key_id, 0.0) >= EVERY_SECONDS:
            self._noted[key_id] = now
            self._new[key_id] = clock.format_instant(now), client_ip

    async def run(self) -> None:
        """Write what was noted, for ever. Supervised."""
        while True:
            await asyncio.sleep(WRITE_EVERY)
            try:
                await self.flush()
            except Exception:
                log.exception("the last uses of API keys could not be written")

    async def flush(self) -> None:
        """Write what was noted since the last time."""
        new, self._new = list(self._new.items()), {}
        long_ago = clock.time_s() - EVERY_SECONDS
        self._noted = {key_id: at for key_id, at in self._noted.items() if at > long_ago}
        for start in range(0, len(new), AT_ONCE):
            part = dict(new[start : start + AT_ONCE])
            await self._work(lambda part=part: _write(part), entry=Entry("security.key_uses"))  # type: ignore[misc]  # bound per round


def _write(uses: dict[str, tuple[str, str]]) -> None:
    """Another process may have written a later use, or one less than a minute ago: that one stays."""
    due = ApiKeyRow.last_used_at.is_null() | (ApiKeyRow.last_used_at < clock.now(-EVERY_SECONDS + WRITE_EVERY))
    rows = list(ApiKeyRow.select(ApiKeyRow.id).where(ApiKeyRow.id.in_(list(uses)) & due).order_by(ApiKeyRow.id))
    for row in rows:
        row.last_used_at, row.last_used_ip = uses[row.id]
    if rows:
        written: Any = ApiKeyRow  # whose stubs leave this function bare
        written.bulk_update(rows, fields=[ApiKeyRow.last_used_at, ApiKeyRow.last_used_ip])
