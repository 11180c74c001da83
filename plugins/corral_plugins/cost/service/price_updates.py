"""Fetches newer price tables from genai-prices and uses the newest one in every process.

One process fetches and stores the table. The other processes notice the new table within seconds. If the setting
`cost.update_prices` is switched off, the table from the installed package is used again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import zlib
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import SYSTEM, UnitContext
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.errors import ExpectedFailure
from corral.plugin import Settings
from corral_plugins.cost.models import FetchedPriceTable
from corral_plugins.cost.service import price_table
from corral_plugins.cost.service.day_buckets import DAY
from corral_plugins.cost.settings import UPDATE_PRICES

log = logging.getLogger("corral.cost")

ROW_ID = 1
MAX_BYTES = 16 * 1024 * 1024
FETCH_SECONDS = 60.0

_FETCHED_AT = Statement(
    lambda p: FetchedPriceTable.select(FetchedPriceTable.fetched_at).where(FetchedPriceTable.id == ROW_ID).tuples()
)


class PriceTableNotFetched(ExpectedFailure):
    """Raised when the newest price table cannot be fetched. The current table stays in use."""


class PriceUpdates:
    """Fetches, stores and loads price tables. Every method runs outside units of work."""

    def __init__(self, work: Work, egress: Egress, settings: Settings) -> None:
        self._work, self._egress, self._settings = work, egress, settings
        self._used: str | None = None

    async def fetch(self) -> None:
        """Fetch and store the newest table, if `cost.update_prices` is on and the stored table is older than a day.

        Raise `PriceTableNotFetched` if the table cannot be fetched or read.
        """
        if not self._settings.get(UPDATE_PRICES):
            return
        stored_at = await self._work(_stored_at, read=True)
        if stored_at is not None and stored_at > clock.now(-DAY):
            return
        content = await self._download(price_table.update_url())
        try:
            data = await asyncio.to_thread(_checked, content)
        except (ValueError, TypeError, LookupError) as error:
            raise PriceTableNotFetched(f"The fetched price table cannot be read: {error}"[:500]) from None
        entry = UnitContext(label="job cost.update_prices", actor=SYSTEM)
        await self._work(lambda: _store(data), entry=entry)

    async def refresh(self) -> None:
        """Use the stored table if it has changed, or the installed package's table if `cost.update_prices` is off.

        A stored table that this version of genai-prices cannot read is ignored until another table is stored.
        """
        fetched_at = await self._work(_stored_at, read=True) if self._settings.get(UPDATE_PRICES) else None
        if fetched_at == self._used:
            return
        data = None if fetched_at is None else await self._work(_stored_data, read=True)
        self._used = fetched_at
        try:
            await asyncio.to_thread(_use, data, fetched_at)
        except Exception:  # whatever the library raises; prices and budgets must still be refreshed
            log.warning(
                "the fetched price table cannot be read; the table in the package is used instead", exc_info=True
            )
            await asyncio.to_thread(_use, None, None)
        log.info("price table changed", extra={"version": price_table.price_table_version()})

    async def _download(self, url: str) -> bytes:
        import httpx2

        from corral.egress.transport import is_truncated

        async with self._egress.client("prices", total_seconds=FETCH_SECONDS, max_bytes=MAX_BYTES) as client:
            try:
                response = await client.get(url)
            except EgressBlocked as blocked:
                raise PriceTableNotFetched(f"{url}: {blocked.reason}") from None
            except httpx2.HTTPError as error:
                raise PriceTableNotFetched(f"{url} does not answer: {str(error) or type(error).__name__}") from None
        if response.status_code != 200 or is_truncated(response):
            raise PriceTableNotFetched(
                f"{url} answered with status {response.status_code}, {len(response.content)} bytes"
            )
        return bytes(response.content)


def _stored_at() -> str | None:
    row = _FETCHED_AT.one({})
    return None if row is None else str(row[0])


def _store(data: str) -> None:
    columns = {FetchedPriceTable.fetched_at: clock.now(), FetchedPriceTable.data: data}
    insert = FetchedPriceTable.insert({FetchedPriceTable.id: ROW_ID, **columns})
    insert.on_conflict(conflict_target=[FetchedPriceTable.id], update=columns).execute()


def _stored_data() -> str:
    return str(FetchedPriceTable.get_by_id(ROW_ID).data)


def _checked(content: bytes) -> str:
    """Compress and encode a fetched table for storage. Raise `ValueError` if genai-prices cannot read the table."""
    raw: Any = json.loads(content)
    if not isinstance(raw, list) or not price_table.parse_providers(raw):
        raise ValueError("the price table is not a list of providers")
    return base64.b64encode(zlib.compress(content)).decode()


def _use(data: str | None, fetched_at: str | None) -> None:
    providers = None
    if data is not None:
        providers = price_table.parse_providers(json.loads(zlib.decompress(base64.b64decode(data))))
    price_table.use_providers(providers, fetched_at)
    price_table.load_price_table()
