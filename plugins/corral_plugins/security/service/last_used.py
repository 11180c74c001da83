"""Records when and from which address each API key was last used.

Uses are written in batches, at most once a minute for each key.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.database.unit import Entry
from corral_plugins.security.models import ApiKeyRow

log = logging.getLogger("corral.security")

RECORD_SECONDS = 60.0
WRITE_SECONDS = 5.0
BATCH_SIZE = 200


class LastUsed:
    """Collects the last use of each API key in memory. Used on the event loop only."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._recorded: dict[str, float] = {}
        self._pending: dict[str, tuple[str, str]] = {}

    def record(self, key_id: str, client_ip: str) -> None:
        """Record a use of a key.

        Most calls return early, because the key was already recorded within the last minute.
        """
        now = clock.time_s()
        if now - self._recorded.get(key_id, 0.0) >= RECORD_SECONDS:
            self._recorded[key_id] = now
            self._pending[key_id] = clock.format_instant(now), client_ip

    async def run(self) -> None:
        """Write the collected uses every 5 seconds. Runs as a supervised task."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await self.flush()
            except Exception:
                log.exception("cannot write the last use of API keys")

    async def flush(self) -> None:
        """Write the uses collected since the previous call."""
        new, self._pending = list(self._pending.items()), {}
        long_ago = clock.time_s() - RECORD_SECONDS
        self._recorded = {key_id: at for key_id, at in self._recorded.items() if at > long_ago}
        for start in range(0, len(new), BATCH_SIZE):
            part = dict(new[start : start + BATCH_SIZE])
            await self._work(lambda part=part: _write(part), entry=Entry("security.last_used"))  # type: ignore[misc]  # bound in each iteration


def _write(uses: dict[str, tuple[str, str]]) -> None:
    """Write the uses. A more recent use written by another process is kept."""
    due = ApiKeyRow.last_used_at.is_null() | (ApiKeyRow.last_used_at < clock.now(-RECORD_SECONDS + WRITE_SECONDS))
    rows = list(ApiKeyRow.select(ApiKeyRow.id).where(ApiKeyRow.id.in_(list(uses)) & due).order_by(ApiKeyRow.id))
    for row in rows:
        row.last_used_at, row.last_used_ip = uses[row.id]
    if rows:
        written: Any = ApiKeyRow  # the type stubs do not annotate bulk_update
        written.bulk_update(rows, fields=[ApiKeyRow.last_used_at, ApiKeyRow.last_used_ip])
